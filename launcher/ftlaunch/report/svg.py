"""Charts as inline SVG: no script, no font and no other file, in colours that the page's style sheet chooses."""

import math
from collections.abc import Callable, Sequence

from ftlaunch.report.curves import Chart, Point, Series
from ftlaunch.report.markup import escape

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 34
"""Margins of the plotted area."""
MOST_POINTS = 400
"""Points of a line; more are drawn as the lowest and the highest of each stretch, so that no spike is lost."""
COLOURS = 8
"""Series colours of the style sheet, `.c0` to `.c7`."""


def draw(chart: Chart) -> str:
    """The chart as a `<figure>`: title, legend with the newest values, and the picture."""
    xs = [x for series in chart.series for x, _ in series.points]
    ys = [y for series in chart.series for _, y in series.points]
    low, high = _span(ys)
    left, right = (min(xs), max(xs)) if not chart.dots else _span(xs)
    # With a single step, the scale would divide by a width of zero.
    right = right if right > left else left + 1
    to_x = _scale(left, right, LEFT, WIDTH - RIGHT)
    # SVG counts y from the top, so the lowest value is at the larger y.
    to_y = _scale(low, high, HEIGHT - BOTTOM, TOP)
    drawn = [_mark(index, series, to_x, to_y, dots=chart.dots) for index, series in enumerate(chart.series)]
    axes = _grid(low, high, to_y) + _x_axis(left, right, to_x, chart.x_label)
    title = f"{chart.title}, {chart.unit}" if chart.unit else chart.title
    label = escape(f"{title}: {'; '.join(_newest(series) for series in chart.series)}")
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{axes}{"".join(drawn)}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{_legend(chart)}{picture}</figure>"


def _legend(chart: Chart) -> str:
    keys = (
        f'<li><i class="c{index % COLOURS}"></i>{escape(_newest(series))}</li>'
        for index, series in enumerate(chart.series)
    )
    return f"<ul>{''.join(keys)}</ul>"


def _newest(series: Series) -> str:
    return f"{series.name} {series.says or number(series.points[-1][1])}"


def _mark(
    index: int, series: Series, to_x: Callable[[float], float], to_y: Callable[[float], float], *, dots: bool
) -> str:
    colour = f"c{index % COLOURS}"
    placed = [(to_x(x), to_y(y)) for x, y in (series.points if dots else thinned(series.points))]
    if dots or len(placed) == 1:
        spots = (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in placed)
        names = (
            f'<text x="{min(max(x, LEFT + 30), WIDTH - 40):.1f}" y="{max(y - 7, 9):.1f}">{escape(series.name)}</text>'
            for x, y in placed
            if dots
        )
        return f'<g class="{colour} dot"><title>{escape(_newest(series))}</title>{"".join([*spots, *names])}</g>'
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
    return f'<path class="{colour}" d="{path}"><title>{escape(_newest(series))}</title></path>'


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most about `MOST_POINTS` of the points: the lowest and the highest of each stretch, in their order."""
    if len(points) <= MOST_POINTS:
        return list(points)
    # Half as many stretches, since each leaves two points.
    size = math.ceil(len(points) / (MOST_POINTS // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        extremes = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(extremes)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _grid(low: float, high: float, to_y: Callable[[float], float]) -> str:
    lines = ""
    for value in ticks(low, high):
        y = to_y(value)
        lines += f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        lines += f'<text class="tick end" x="{LEFT - 5}" y="{y + 3.5:.1f}">{number(value)}</text>'
    return lines


def _x_axis(left: float, right: float, to_x: Callable[[float], float], label: str) -> str:
    marks = "".join(
        f'<text class="tick middle" x="{min(to_x(value), WIDTH - 14):.1f}" y="{HEIGHT - BOTTOM + 14}">'
        f"{number(value)}</text>"
        for value in ticks(left, right)
    )
    middle = (LEFT + WIDTH - RIGHT) / 2
    return marks + f'<text class="tick middle" x="{middle}" y="{HEIGHT - 4}">{escape(label)}</text>'


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two, about so many of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    # 1e-9 makes up for rounding: 0.3 / 0.1 is 2.9999999999999996, and the tick at 0.3 would be missing.
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _span(values: Sequence[float]) -> tuple[float, float]:
    """A little more than the range of the values, and never nothing."""
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    # The margin does not go below zero where no value does: an axis of losses should not begin at -0.01.
    return (0.0 if low >= 0 > low - room else low - room), high + room


def _scale(low: float, high: float, to_low: float, to_high: float) -> Callable[[float], float]:
    return lambda value: to_low + (value - low) / (high - low) * (to_high - to_low)


def number(value: float) -> str:
    """A number in few characters: 1,234 or 0.0312 or 2e-05."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.4g}"
    if abs(value) >= 10_000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    return f"{value:.4g}"
