"""What one finished run shows: its quality, its speed, and what it takes."""

from collections.abc import Iterable, Iterator
from statistics import median
from typing import Any, cast

import msgspec
from msgspec import Struct

from ftlaunch.recipe.stages import Training
from ftlaunch.run.files import read_json, read_jsonl
from ftlaunch.run.layout import RunDir, StageDir
from ftlaunch.run.records import RowLosses, StepMetrics, TrainingResult

WARM_UP_STEPS = 3
"""Steps at a stage's beginning whose time does not count, where there are more than twice as many."""
# What every step has, such as its time or learning rate; the rest is what stages and evaluations measure.
NOT_QUALITY = (StepMetrics.__annotations__.keys() | {"noise/scale"}) - {"loss"}


class Measures(Struct, frozen=True, kw_only=True):
    """Quality, speed and cost of a run's last training stage."""

    quality: dict[str, float]
    """Its loss in the last step, and all that its last evaluation says."""
    seconds_a_step: float
    """Median of its optimizer steps after the warm-up, without evaluations and saves."""
    peak_memory_bytes: float
    trained_parameters: float
    artifact_bytes: float
    """Weights in the artifact."""
    row_losses: list[float]
    """Loss a token of each row held out, in one order for all variants; empty where the stage tells none."""


def measure(run: RunDir) -> Measures:
    """What a finished run shows."""
    step = [one for one in run.stage_dirs() if isinstance(one.read_spec().stage, Training)][-1]
    newest: dict[str, Any] = {}
    peak = 0.0

    # One pass over a file that may be long: the newest values and the peak are collected on the way.
    def trained() -> Iterator[StepMetrics]:
        nonlocal peak
        for line in read_jsonl(step.metrics):
            newest.update(line)
            if "loss" in line:
                peak = max(peak, line["peak_memory_bytes"])
                yield cast(StepMetrics, line)

    # This reads the file to its end, and only then are `newest` and `peak` what they are used for below.
    seconds = median(seconds_a_step(trained()))
    return Measures(
        quality=_quality(newest),
        seconds_a_step=seconds,
        peak_memory_bytes=peak,
        trained_parameters=msgspec.json.decode(step.result.read_bytes(), type=TrainingResult).trained_parameters,
        artifact_bytes=sum(path.stat().st_size for path in step.artifact.glob("*.safetensors")),
        row_losses=_row_losses(step),
    )


def _quality(newest: dict[str, Any]) -> dict[str, float]:
    """The newest value of everything that is measured, but for what tells of speed and course."""
    kept = {key: value for key, value in newest.items() if key not in NOT_QUALITY and isinstance(value, int | float)}
    # False sorts first: evaluations come before what was measured in training, and sorted() keeps their order.
    return dict(sorted(kept.items(), key=lambda item: not item[0].startswith("eval/")))


def seconds_a_step(trained: Iterable[StepMetrics]) -> list[float]:
    """Seconds of each optimizer step after the warm-up, without evaluations and saves."""
    taken: list[float] = []
    tokens = 0
    for line in trained:
        if (speed := line.get("tokens_per_second")) and "tokens" in line:
            # `tokens` counts up over the whole stage; the speed is that of this step alone, without evaluation or save.
            taken.append((line["tokens"] - tokens) / speed)
            tokens = line["tokens"]
    return taken[WARM_UP_STEPS:] if len(taken) > 2 * WARM_UP_STEPS else taken


def _row_losses(stage_dir: StageDir) -> list[float]:
    told = read_json(stage_dir.evaluation, RowLosses)
    return [nll / tokens for nll, tokens in told.rows if tokens] if told else []
