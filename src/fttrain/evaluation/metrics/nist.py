"""NIST: n-grams weighted by how much they tell."""

import math
from collections import Counter

import numpy as np

from fttrain.evaluation.metrics.additive import AdditiveMetric, Scores, ratio
from fttrain.evaluation.words import grams, words

ORDER = 5
HALF_AT = 2 / 3
"""Share of the references' length: answers as short as that lose half of their score."""

Gram = tuple[str, ...]


class Nist(AdditiveMetric):
    """`nist`, from 0: n-grams up to 5 by the bits that each tells beyond its beginning, as all references have it."""

    source = "Doddington, HLT 2002"

    def statistics(self, predictions: list[str], references: list[list[str]]) -> np.ndarray:
        told = [[words(text) for text in texts] for texts in references]
        known = Counter(gram for texts in told for text in texts for gram in grams(text, ORDER))
        # The beginning of a single word is empty, and seen as often as there are words.
        known[()] = sum(len(text) for texts in told for text in texts)
        pairs = zip(map(words, predictions), told, strict=True)
        return np.array([_counted(said, texts, known) for said, texts in pairs])

    def combine(self, sums_RK: np.ndarray) -> Scores:
        gained, possible, (said, told) = sums_RK[:, :ORDER], sums_RK[:, ORDER : 2 * ORDER], sums_RK[:, -2:].T
        strength = math.log(0.5) / math.log(HALF_AT) ** 2
        # An empty answer has log 0 = -inf, by which its brevity comes out as 0, as it should.
        with np.errstate(divide="ignore"):
            brevity = np.exp(strength * np.log(np.minimum(1.0, ratio(said, told))) ** 2)
        return {"nist": ratio(gained, possible).sum(1) * brevity}


def _counted(said: list[str], references: list[list[str]], known: Counter[Gram]) -> list[float]:
    """Bits gained and n-grams of the answer, by their length; its words, and those of a reference on average."""
    gained, possible = [0.0] * ORDER, [0.0] * ORDER
    most = Counter[Gram]()
    for reference in references:
        most |= Counter(grams(reference, ORDER))
    for gram, count in Counter(grams(said, ORDER)).items():
        possible[len(gram) - 1] += count
        if gram in most:
            gained[len(gram) - 1] += min(count, most[gram]) * math.log2(known[gram[:-1]] / known[gram])
    return [*gained, *possible, len(said), sum(map(len, references)) / len(references)]
