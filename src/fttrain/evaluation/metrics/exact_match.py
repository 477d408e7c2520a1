"""Exact match of answers."""

from fttrain.evaluation.metrics.additive import MeanMetric
from fttrain.evaluation.words import normalized


class ExactMatch(MeanMetric):
    """`exact_match`, 0 to 100: answers that are one of their references, apart from case, punctuation and articles."""

    names = ("exact_match",)
    source = "arXiv 1606.05250"

    def values(self, prediction: str, reference: list[str]) -> tuple[float, ...]:
        return (float(normalized(prediction) in map(normalized, reference)),)
