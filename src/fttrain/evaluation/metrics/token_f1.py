"""F1 of the words of answers."""

from collections import Counter

from fttrain.evaluation.metrics.additive import MeanMetric
from fttrain.evaluation.words import normalized


class TokenF1(MeanMetric):
    """`token_f1`, 0 to 100: F1 of an answer's words and a reference's as bags, the best of its references, the mean
    over answers; case, punctuation and articles do not count."""

    names = ("token_f1",)
    source = "arXiv 1606.05250"

    def values(self, prediction: str, reference: list[str]) -> tuple[float, ...]:
        said = normalized(prediction).split()
        return (max(_f1(said, normalized(text).split()) for text in reference),)


def _f1(said: list[str], told: list[str]) -> float:
    if not said or not told:
        return float(said == told)
    return 2 * (Counter(said) & Counter(told)).total() / (len(said) + len(told))
