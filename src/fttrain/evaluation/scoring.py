"""Scores of a model's answers by any number of metrics, with intervals, and how much two models differ.

Intervals are of the percentile bootstrap over examples (Efron 1979); two models are compared over the same resamples
(Koehn 2004), so what is hard for both cancels out.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ftlaunch.errors import UserError
from ftlaunch.recipe.names import is_local
from ftlaunch.recipe.stages import METRICS, Need
from ftlaunch.run.records import Gap
from ftlaunch.safety import trust

if TYPE_CHECKING:
    from fttrain.evaluation.metrics.additive import AdditiveMetric

RESAMPLED_AT_ONCE = 64
"""Resamples whose weights are held in memory together."""
COMMIT = re.compile(r"[0-9a-f]{40}")
MODULES = "fttrain.evaluation.metrics"


@dataclass(frozen=True)
class Inputs:
    """What a metric is given: a prediction and its reference for each example."""

    predictions: list[Any]
    references: list[Any]


@dataclass(frozen=True)
class Score:
    """One score of one model."""

    value: float
    interval: tuple[float, float] | None
    """95 %; None where the metric cannot be resampled, or nobody asked for it."""


@dataclass(frozen=True)
class Scored:
    """All scores of one model."""

    scores: dict[str, Score]
    resampled: dict[str, np.ndarray]
    """[R] of each score that can be resampled."""
    examples: dict[Need, dict[str, list[float]]]
    """Each score of every example by itself, where that can be told."""


def need_of(metric: str) -> Need:
    """What a metric has to be given; one from elsewhere gets answers and references."""
    return METRICS.get(metric, "answers")


def needs_of(metrics: Sequence[str]) -> set[Need]:
    """What several metrics have to be given."""
    return {need_of(metric) for metric in metrics}


def load_metric(name: str) -> Any:
    """A metric by the name of a shipped one, the absolute path of a file or folder, or ID@COMMIT of the hub.

    One from elsewhere is a program: it must be the user's own or pinned. Raises UserError where it cannot be had.
    """
    import evaluate

    if name in METRICS:
        module = importlib.import_module(f"{MODULES}.{name}")
        (kind,) = [one for one in vars(module).values() if _is_metric_of(one, module.__name__)]
        return kind(keep_in_memory=True)
    place, _, commit = name.partition("@")
    if is_local(place):
        trust.require(Path(place), deep=Path(place).is_dir())
    elif not COMMIT.fullmatch(commit):
        remedy = f"name a file, a folder, ID@COMMIT of the hub, or one of {', '.join(METRICS)}"
        raise UserError(f"there is no metric {name}", remedy)
    try:
        if is_local(place):
            return evaluate.load(place, module_type="metric", keep_in_memory=True)
        return _of_hub(place if "/" in place else f"evaluate-metric/{place}", commit)
    except (OSError, ImportError, ValueError, TypeError, ModuleNotFoundError) as error:
        message = f"the metric {name} cannot be loaded: {str(error).strip()}"
        raise UserError(message, "name a shipped metric, or a file or folder with an evaluate.Metric") from error


def _of_hub(name: str, commit: str) -> Any:
    """The metric of the hub at a commit, and at no other."""
    from evaluate.loading import HubEvaluationModuleFactory, import_main_class

    # Not `evaluate.load`: that takes a folder of this name in the working directory, or what of any commit is cached.
    found = HubEvaluationModuleFactory(name, revision=commit).get_module()
    metric: Any = import_main_class(found.module_path)
    loaded = metric(keep_in_memory=True, hash=found.hash)
    loaded.download_and_prepare()
    return loaded


def _additive() -> "type[AdditiveMetric]":
    """Return the class of metrics that can be resampled."""
    # Imported where something is scored: `evaluate` loads transformers' pipelines, which take 90 MB and a tenth of the
    # time of a rank's imports, and a stage that scores no answers needs neither.
    from fttrain.evaluation.metrics.additive import AdditiveMetric

    return AdditiveMetric


def _is_metric_of(value: object, module: str) -> bool:
    return isinstance(value, type) and issubclass(value, _additive()) and value.__module__ == module


def score(metrics: Sequence[str], inputs: Mapping[Need, Inputs], resamples: int, seed: int) -> Scored:
    """Scores by every metric, in their order; `resamples` of the examples give the intervals, none without any."""
    found = Scored({}, {}, {})
    for name in metrics:
        given = inputs[need_of(name)]
        metric = load_metric(name)
        if isinstance(metric, _additive()):
            own = found.examples.setdefault(need_of(name), {})
            _score_resampled(metric, given, resamples, seed, found, own)
        else:
            values = _computed(metric, given, name)
            found.scores.update({_free(key, name, found): Score(value, None) for key, value in values.items()})
    return found


def _score_resampled(
    metric: "AdditiveMetric", given: Inputs, resamples: int, seed: int, found: Scored, examples: dict[str, list[float]]
) -> None:
    # Statistics of examples add up (hits, lengths, n-grams), so a resample is a product with weights, not a new
    # scoring.
    statistics_NK = metric.statistics(given.predictions, given.references)
    values = metric.combine(statistics_NK.sum(0, keepdims=True))
    by_example = metric.combine(statistics_NK)
    resampled = resample(metric, statistics_NK, resamples, seed) if resamples else {}
    for key, value in values.items():
        found.scores[key] = Score(float(value[0]), _interval(resampled[key]) if resamples else None)
        examples[key] = by_example[key].tolist()
        if resamples:
            found.resampled[key] = resampled[key]


def _computed(metric: Any, given: Inputs, name: str) -> dict[str, float]:
    """The numbers that a metric from elsewhere makes of the answers."""
    try:
        made = metric.compute(predictions=given.predictions, references=_as_wanted(metric, given.references))
    # Code of somebody else, which may raise anything.
    except Exception as error:
        raise UserError(f"the metric {name} failed: {error}", "correct the metric, or leave it out") from error
    return {key: float(value) for key, value in (made or {}).items() if isinstance(value, int | float | np.number)}


def _as_wanted(metric: Any, references: list[Any]) -> list[Any]:
    """Lists of references; the first of each where a metric takes only one."""
    features = metric.features[0] if isinstance(metric.features, list) else metric.features
    takes_one = getattr(features.get("references"), "dtype", None) == "string"
    return [each[0] for each in references] if takes_one else references


def _free(key: str, metric: str, found: Scored) -> str:
    """A name that no other score has."""
    return key if key not in found.scores else f"{Path(metric.partition('@')[0]).stem}/{key}"


def resample(metric: "AdditiveMetric", statistics_NK: np.ndarray, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """[R] of each score over examples drawn with replacement: the same draws for all with one seed and N."""
    # A generator from the seed at each call: all models and metrics get the same draws, which paired intervals need.
    draw = np.random.default_rng(seed)
    count = len(statistics_NK)
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, resamples, RESAMPLED_AT_ONCE):
        size = min(RESAMPLED_AT_ONCE, resamples - start)
        weights_RN = draw.multinomial(count, np.full(count, 1 / count), size=size)
        parts.append(metric.combine(weights_RN @ statistics_NK))
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def gaps(ours: Scored, theirs: Scored) -> dict[str, Gap]:
    """How much we are above them, of each score that both have resampled."""
    shared = [key for key in ours.resampled if key in theirs.resampled]
    # Differences within each resample, not of two intervals: examples that are hard for both cancel out.
    differences = {key: ours.resampled[key] - theirs.resampled[key] for key in shared}
    means = {key: ours.scores[key].value - theirs.scores[key].value for key in shared}
    return {key: Gap(means[key], _interval(differences[key])) for key in shared}


def _interval(values_R: np.ndarray) -> tuple[float, float]:
    """What 95 % of the resamples lie within."""
    low, high = np.quantile(values_R[np.isfinite(values_R)], [0.025, 0.975]) if np.isfinite(values_R).any() else (0, 0)
    return float(low), float(high)
