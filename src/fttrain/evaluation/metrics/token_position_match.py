"""Words in the very place that a reference has them."""

import numpy as np

from fttrain.evaluation.metrics.additive import AdditiveMetric, Scores


class TokenPositionMatch(AdditiveMetric):
    """`token_position_match`, 0 to 100: the share of the references' words, split at spaces, that an answer has in the
    same place. Of several references the one that it matches best counts. One word more at the beginning, and nothing
    matches: it is no accuracy, though it has been called so."""

    def statistics(self, predictions: list[str], references: list[list[str]]) -> np.ndarray:
        pairs = zip(predictions, references, strict=True)
        return np.array([_best(text.split(), told) for text, told in pairs], dtype=np.float64)

    def combine(self, sums_RK: np.ndarray) -> Scores:
        return {"token_position_match": 100 * sums_RK[:, 0] / np.maximum(sums_RK[:, 1], 1)}


def _best(said: list[str], references: list[str]) -> tuple[int, int]:
    """Words that are in their place, and words of the reference."""
    counted = [(_in_place(said, text.split()), len(text.split())) for text in references]
    return max(counted, key=lambda one: (one[0] / max(one[1], 1), -one[1]))


def _in_place(said: list[str], told: list[str]) -> int:
    return sum(first == second for first, second in zip(said, told, strict=False))
