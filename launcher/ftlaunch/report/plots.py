"""Charts as PNG files, by matplotlib where it is installed."""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ftlaunch.report.curves import Chart
from ftlaunch.run.files import write_atomic

UNSAFE = re.compile(r"[^a-z0-9]+")


def can_plot() -> bool:
    """Whether matplotlib is installed for this interpreter."""
    return find_spec("matplotlib") is not None


def write_plots(charts: Sequence[Chart], folder: Path, prefix: str) -> None:
    """Write a PNG for each chart, `PREFIX-TITLE.png`."""
    for chart in charts:
        _write(chart, folder / f"{prefix}-{UNSAFE.sub('-', chart.title.lower()).strip('-')}.png")


def _write(chart: Chart, path: Path) -> None:
    from io import BytesIO

    from matplotlib.figure import Figure

    # A Figure of its own, without pyplot, needs no display and keeps no global state.
    figure: Any = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for series in chart.series:
        xs, ys = zip(*series.points, strict=True)
        # A line through a single point is invisible.
        axes.plot(xs, ys, "o" if chart.dots or len(xs) == 1 else "-", label=series.name, linewidth=1.2)
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.unit or chart.title)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomic(path, picture.getvalue())
