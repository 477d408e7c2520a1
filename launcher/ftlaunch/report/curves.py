"""The metrics of a stage → the charts that show them: titles, units and points, not yet how they are drawn."""

import math
from collections.abc import Iterable, Sequence
from typing import cast

from msgspec import Struct

from ftlaunch.recipe.stages import SCORES
from ftlaunch.report.facts import RunFacts, StageFacts
from ftlaunch.run.progress import Entry
from ftlaunch.run.records import Counts, StepMetrics, TrainingResult

Point = tuple[float, float]


class Series(Struct, frozen=True):
    """One line of a chart, or one dot with its name."""

    name: str
    points: list[Point]
    says: str = ""
    """What a legend says of it, where its last value says nothing."""


class Chart(Struct, frozen=True, kw_only=True):
    """Several series over one axis."""

    title: str
    unit: str = ""
    x_label: str = "optimizer step"
    series: list[Series]
    dots: bool = False
    """Points that stand for themselves, rather than lines."""


class Curve(Struct, frozen=True):
    """A chart of known metrics: its title and, for each key, the name of its series and what it is multiplied by."""

    title: str
    keys: dict[str, str]
    unit: str = ""
    factor: float = 1.0


KNOWN = (
    Curve("Loss", {"loss": "trained", "eval/loss": "held out"}),
    Curve("Perplexity", {"perplexity": "trained", "eval/perplexity": "held out"}),
    Curve("Token accuracy", {"eval/token_accuracy": "held out"}),
    Curve("Reward accuracy", {"rewards/accuracy": "trained", "eval/rewards/accuracy": "held out"}),
    Curve("Reward margin", {"rewards/margin": "trained", "eval/rewards/margin": "held out"}),
    Curve("Rewards", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    Curve("Rewards held out", {"eval/rewards/chosen": "chosen", "eval/rewards/rejected": "rejected"}),
    Curve("Calibration error", {"eval/rewards/calibration_error": "held out"}),
    Curve("Reward", {"reward": "sampled", "eval/reward": "held out"}),
    Curve("KL from the reference", {"kl": "sampled", "eval/kl": "held out"}, "nats per answer"),
    Curve("BLEU", {"eval/bleu": "held out"}),
    Curve("ROUGE", {f"eval/{name}": name for name in SCORES["rouge"]}),
    Curve("Learning rate", {"learning_rate": "peak of all groups"}),
    Curve("Gradient norm", {"grad_norm": "before clipping"}),
    Curve("Throughput", {"tokens_per_second": "all ranks"}, "tokens/s"),
    Curve("Peak memory", {"peak_memory_bytes": "the fullest rank"}, "GB", 1e-9),
    Curve("AdaLoRA's ranks", {"rank/most": "largest", "rank/mean": "mean", "rank/least": "smallest"}),
    Curve("Noise scale", {"noise/scale": "share of the recipe's"}),
)
COUNTERS = StepMetrics.__annotations__.keys()
"""Keys of metrics.jsonl that are no curve."""


def of_stage(stage: StageFacts) -> list[Chart]:
    """A chart for everything that a stage has measured, known metrics first."""
    lines = _with_perplexity(stage)
    charts = [_known(curve, lines) for curve in _curves(lines)]
    return [chart for chart in [*charts, _lengths(stage)] if chart.series]


def _lengths(stage: StageFacts) -> Chart:
    """How long the rows of each data set are; without a series where nobody has measured it."""
    data = stage.result.data if isinstance(stage.result, TrainingResult) else {}
    series = [Series(name, _bars(one), f"longest {one.longest:,}") for name, one in data.items() if one.lengths]
    return Chart(title="Length of rows", unit="rows", x_label="tokens of a row", series=series)


def _bars(counts: Counts) -> list[Point]:
    """The outline of a histogram."""
    width = counts.longest / len(counts.lengths)
    tops = [((at + end) * width, float(rows)) for at, rows in enumerate(counts.lengths) for end in (0, 1)]
    return [(0.0, 0.0), *tops, (float(counts.longest), 0.0)]


def _curves(lines: Sequence[Entry]) -> list[Curve]:
    """The known curves, and one for each key that is none of theirs, with that of its evaluation."""
    shown = {key for curve in KNOWN for key in curve.keys} | COUNTERS
    # A dict and not a set: charts keep the order in which the metrics first appear, the same on every page.
    others = dict.fromkeys(key for line in lines for key, value in line.items() if _is_number(value))
    own: dict[str, dict[str, str]] = {}
    for key in (key for key in others if key not in shown):
        # A metric and its evaluation, such as `margin` and `eval/margin`, share one chart.
        held_out = key.startswith("eval/")
        own.setdefault(key.removeprefix("eval/"), {})[key] = "held out" if held_out else "trained"
    return [*KNOWN, *(Curve(title, keys) for title, keys in own.items())]


def _with_perplexity(stage: StageFacts) -> list[Entry]:
    lines = [*stage.trained, *stage.evaluated]
    # Only SFT's loss is a mean cross-entropy per token, whose exponential is the perplexity.
    if stage.kind != "sft":
        return lines
    return [cast(Entry, {**line, "perplexity": perplexity(line.get("loss"))}) for line in lines]


def perplexity(loss: float | None) -> float | None:
    """The perplexity that a mean cross-entropy per token comes to; None where there is none."""
    # exp(710) overflows a float. `not <` rather than `>=` also leaves out NaN.
    return None if loss is None or not loss < 700 else math.exp(loss)


def _known(curve: Curve, lines: Sequence[Entry]) -> Chart:
    series = [Series(name, points(lines, key, curve.factor)) for key, name in curve.keys.items()]
    return Chart(title=curve.title, unit=curve.unit, series=[one for one in series if one.points])


def points(lines: Iterable[Entry], key: str, factor: float = 1.0) -> list[Point]:
    """(step, value) of every line that has the metric as a finite number."""
    return [(line["step"], line[key] * factor) for line in lines if _is_number(line.get(key))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def overlaid(runs: Sequence[RunFacts], names: Sequence[str]) -> dict[str, list[Chart]]:
    """Return the charts of each stage that runs have in common by name: one for every series, with one line per run."""
    found: dict[str, list[Chart]] = {}
    for stage in dict.fromkeys(stage.status.name for run in runs for stage in run.stages):
        charts: dict[tuple[str, str, str], list[Series]] = {}
        for run, name in zip(runs, names, strict=True):
            of_run = [chart for one in run.stages if one.status.name == stage for chart in of_stage(one)]
            for chart in of_run:
                for series in chart.series:
                    # A chart for each series: its lines are the runs, and "trained" and "held out" would double them.
                    title = (chart.title, series.name, chart.unit)
                    charts.setdefault(title, []).append(Series(name, series.points, series.says))
        found[stage] = [
            Chart(title=f"{title}, {series}", unit=unit, series=lines)
            for (title, series, unit), lines in charts.items()
        ]
    return {stage: charts for stage, charts in found.items() if charts}
