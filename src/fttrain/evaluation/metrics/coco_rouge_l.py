"""ROUGE-L as the E2E and COCO challenges count it."""

from itertools import pairwise

from fttrain.evaluation.metrics.additive import MeanMetric
from fttrain.evaluation.words import words

BETA = 1.2
"""How much more recall counts than precision."""


class CocoRougeL(MeanMetric):
    """`rouge_l`, 0 to 100: F of the best precision and the best recall that any reference gives, by the longest common
    subsequence of words, the mean over answers."""

    names = ("rouge_l",)
    source = "aclanthology.org/W04-1013; github.com/tuetschek/e2e-metrics"

    def values(self, prediction: str, reference: list[str]) -> tuple[float, ...]:
        said, told = words(prediction), [words(text) for text in reference]
        common = [_longest_common(said, text) for text in told]
        if not max(common):
            return (0.0,)
        precision = max(common) / len(said)
        recall = max(length / len(text) for length, text in zip(common, told, strict=True) if text)
        return ((1 + BETA**2) * precision * recall / (recall + BETA**2 * precision),)


def _longest_common(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence."""
    # One row of the usual table is enough: each length needs the row above and its left neighbour only.
    lengths = [0] * (len(second) + 1)
    for word in first:
        longer = [0]
        for other, (before, above) in zip(second, pairwise(lengths), strict=True):
            longer.append(before + 1 if word == other else max(above, longer[-1]))
        lengths = longer
    return lengths[-1]
