"""The measures of all variants side by side, each against the first."""

from collections.abc import Callable, Sequence

from msgspec import Struct

from ftlaunch.compare.measures import Measures
from ftlaunch.compare.statistics import Difference, Spread, paired, spread


class Row(Struct, frozen=True, kw_only=True):
    """One variant over all seeds."""

    variant: str
    runs: list[str]
    """Folder of each seed's run."""
    quality: dict[str, Spread]
    difference: Difference | None
    """Difference of eval/loss from the first variant's: row by row where both hold the same rows out, else seed by
    seed. None for the first, and where nothing was evaluated."""
    seconds_a_step: Spread
    acceleration: float
    """100·(T0 - T) / T0 in percent, with T0 the first variant's seconds a step: above 0 is faster."""
    peak_memory_bytes: Spread
    trained_parameters: Spread
    artifact_bytes: Spread
    measures: list[Measures]
    """One for each seed's run."""


LOSS = "eval/loss"


def rows(names: Sequence[str], runs: Sequence[Sequence[str]], measured: Sequence[Sequence[Measures]]) -> list[Row]:
    """A row for each variant, whose runs are `runs[variant][seed]` and show `measured[variant][seed]`."""
    return [_row(*variant, measured[0]) for variant in zip(names, runs, measured, strict=True)]


def _row(name: str, folders: Sequence[str], mine: Sequence[Measures], first: Sequence[Measures]) -> Row:
    seconds, before = _over(mine, lambda one: one.seconds_a_step), _over(first, lambda one: one.seconds_a_step)
    # A value that was not finite is null in metrics.jsonl and missing here. A mean over the remaining seeds would
    # look better than the variant is.
    shared = [key for key in mine[0].quality if all(key in one.quality for one in mine)]
    return Row(
        variant=name,
        runs=list(folders),
        quality={key: spread([one.quality[key] for one in mine]) for key in shared},
        difference=None if mine is first else _difference(mine, first),
        seconds_a_step=seconds,
        acceleration=100 * (before.mean - seconds.mean) / before.mean,
        peak_memory_bytes=_over(mine, lambda one: one.peak_memory_bytes),
        trained_parameters=_over(mine, lambda one: one.trained_parameters),
        artifact_bytes=_over(mine, lambda one: one.artifact_bytes),
        measures=list(mine),
    )


def _over(measured: Sequence[Measures], what: Callable[[Measures], float]) -> Spread:
    return spread([what(one) for one in measured])


def _difference(mine: Sequence[Measures], first: Sequence[Measures]) -> Difference | None:
    pairs = list(zip(mine, first, strict=True))
    # Rows are paired by their position. Variants that hold out the same rows list them in the same order.
    if all(one.row_losses and len(one.row_losses) == len(other.row_losses) for one, other in pairs):
        ours, theirs = ([loss for one in side for loss in one.row_losses] for side in (mine, first))
        return paired(ours, theirs, "rows")
    if all(LOSS in one.quality for pair in pairs for one in pair):
        return paired([one.quality[LOSS] for one in mine], [one.quality[LOSS] for one in first], "seeds")
    return None


def head_and_lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The table's head and its lines as text."""
    seen = list(dict.fromkeys(key for row in rows for key in row.quality))
    # Held-out measures if there are any, else what the stage adds, such as PPO's reward; the training loss comes last.
    shown = [key for key in seen if key.startswith("eval/")] or [key for key in seen if key != "loss"] or seen
    of = next((row.difference.of for row in rows if row.difference), None)
    paired_head = [f"Δ {LOSS} [95 %, {of}]"] if of else []
    head = ["variant", *shown, *paired_head, "s/step", "faster", "memory", "trained", "weights"]
    return head, [_line(row, shown, with_difference=bool(of)) for row in rows]


def _line(row: Row, shown: Sequence[str], *, with_difference: bool) -> list[str]:
    return [
        row.variant,
        *(_number(row.quality.get(key)) for key in shown),
        *([_mean_and_interval(row.difference)] if with_difference else []),
        _number(row.seconds_a_step),
        f"{row.acceleration:+.1f} %",
        _bytes(row.peak_memory_bytes.mean),
        f"{row.trained_parameters.mean:,.0f}",
        _bytes(row.artifact_bytes.mean),
    ]


def _number(value: Spread | None) -> str:
    if value is None:
        return "–"
    return f"{value.mean:.4g}" if value.std is None else f"{value.mean:.4g} ± {value.std:.2g}"


def _mean_and_interval(difference: Difference | None) -> str:
    if difference is None:
        return "–"
    mean, half = difference.mean, difference.half_width
    return f"{mean:+.4f}" if half is None else f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
