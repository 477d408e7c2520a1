"""chrF: F-score of character n-grams."""

from collections import Counter

import numpy as np

from fttrain.evaluation.metrics.additive import AdditiveMetric, Scores, ratio

ORDER = 6
BETA = 2.0


class Chrf(AdditiveMetric):
    """`chrf`, 0 to 100: n-grams of up to 6 characters, spaces left out, recall weighted twice, against the reference
    that comes closest."""

    source = "aclanthology.org/W15-3049"

    def statistics(self, predictions: list[str], references: list[list[str]]) -> np.ndarray:
        return np.array([_closest(text, told) for text, told in zip(predictions, references, strict=True)])

    def combine(self, sums_RK: np.ndarray) -> Scores:
        return {"chrf": 100 * _f_score(sums_RK)}


def _closest(text: str, references: list[str]) -> np.ndarray:
    """[3·6]: n-grams in common, of the answer and of the reference, by their length."""
    said = _grams(text)
    counted = np.array([_counts(said, _grams(reference)) for reference in references], dtype=np.float64)
    # Counts and not scores are returned: the corpus score is a ratio of sums, not a mean of ratios.
    return counted[int(_f_score(counted).argmax())]


def _counts(said: list[Counter[str]], told: list[Counter[str]]) -> list[int]:
    common = [(first & second).total() for first, second in zip(said, told, strict=True)]
    return [*common, *(one.total() for one in said), *(one.total() for one in told)]


def _grams(text: str) -> list[Counter[str]]:
    letters = "".join(text.split())
    return [
        Counter(letters[at : at + order] for at in range(len(letters) - order + 1)) for order in range(1, ORDER + 1)
    ]


def _f_score(counts_RK: np.ndarray) -> np.ndarray:
    """[R]: F of mean precision and mean recall over the lengths that both sides have."""
    common, said, told = counts_RK[:, :ORDER], counts_RK[:, ORDER : 2 * ORDER], counts_RK[:, 2 * ORDER :]
    # A text of three letters has no n-grams of six: lengths that one side lacks are left out of the mean.
    counted = (said > 0) & (told > 0)
    orders = counted.sum(1)
    precision = ratio((ratio(common, said) * counted).sum(1), orders)
    recall = ratio((ratio(common, told) * counted).sum(1), orders)
    return ratio((1 + BETA**2) * precision * recall, BETA**2 * precision + recall)
