"""Metrics that are a function of sums over examples, so that a resample of the examples needs no new count."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np

Scores = dict[str, np.ndarray]
"""Score → its value for each of R sets of examples, [R]."""


class AdditiveMetric(evaluate.Metric, ABC):
    """A metric of `evaluate` in two steps: statistics of each example, and scores of their sums."""

    # `evaluate.load` takes the first class among a file's names that is not abstract. So classes that metrics import
    # by name are abstract.

    source: ClassVar[str] = ""
    """Where it is defined."""
    prediction: ClassVar[Any] = datasets.Value("string")
    reference: ClassVar[Any] = datasets.List(datasets.Value("string"))
    """What each example is given as, of a metric of answers: a text, and a list of texts to compare it with."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": self.prediction, "references": self.reference})
        return evaluate.MetricInfo(description=str(self.__doc__), citation=self.source, features=features)

    @abstractmethod
    def statistics(self, predictions: list[Any], references: list[Any]) -> np.ndarray:
        """Return each example's summands, [N, K] float64."""

    @abstractmethod
    def combine(self, sums_RK: np.ndarray) -> Scores:
        """Return the scores of R sets of examples whose statistics add up to these."""

    def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        sums_1K = self.statistics(predictions, references).sum(0, keepdims=True)
        return {name: float(values[0]) for name, values in self.combine(sums_1K).items()}


class MeanMetric(AdditiveMetric, ABC):
    """The mean of a number that each example has by itself, times 100; of several, each under its name."""

    names: tuple[str, ...]

    @abstractmethod
    def values(self, prediction: Any, reference: Any) -> tuple[float, ...]:
        """An example's numbers, from 0 to 1."""

    def statistics(self, predictions: list[Any], references: list[Any]) -> np.ndarray:
        pairs = zip(predictions, references, strict=True)
        return np.array([[1.0, *self.values(prediction, reference)] for prediction, reference in pairs])

    def combine(self, sums_RK: np.ndarray) -> Scores:
        return {name: 100 * sums_RK[:, at] / sums_RK[:, 0] for at, name in enumerate(self.names, start=1)}


class ChoiceMetric(MeanMetric):
    """How often the right one of several (log-likelihood, length) is the largest: as it is, and divided by length."""

    prediction = datasets.List(datasets.List(datasets.Value("float64")))
    reference = datasets.Value("int64")

    def values(self, prediction: list[list[float]], reference: int) -> tuple[float, ...]:
        """Return the two shares; `reference` is the index of the right choice."""
        whole = [likelihood for likelihood, _ in prediction]
        by_length = [likelihood / max(length, 1) for likelihood, length in prediction]
        return tuple(_chosen(scores, reference) for scores in (whole, by_length))


def _chosen(scores: list[float], right: int) -> float:
    """1 where the right one has the largest score, a share of it where others have the same, else 0."""
    best = max(scores)
    return (scores[right] == best) / scores.count(best)


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return above / below, and 0 where `below` is 0."""
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below > 0)
