"""CIDEr: how much an answer is like what people agree on."""

import math
from collections import Counter

import numpy as np

from fttrain.evaluation.metrics.additive import AdditiveMetric, Scores
from fttrain.evaluation.words import grams, words

ORDER = 4
SIGMA = 6.0
"""Words by which an answer may be longer or shorter."""

Gram = tuple[str, ...]
Vector = list[dict[Gram, float]]
"""tf-idf of the n-grams of each length."""


class Cider(AdditiveMetric):
    """`cider`, 0 to 10: cosine of tf-idf vectors of n-grams up to 4, clipped, with a penalty for length (CIDEr-D).

    An n-gram counts for less, the more of the prompts have it in their references; one prompt alone scores 0.
    """

    source = "arXiv 1411.5726"

    def statistics(self, predictions: list[str], references: list[list[str]]) -> np.ndarray:
        told = [[words(text) for text in texts] for texts in references]
        seen = Counter(gram for texts in told for gram in {gram for text in texts for gram in grams(text, ORDER)})
        # The logarithm of the number of prompts: with one prompt every weight is log 1 - log 1 = 0.
        prompts = math.log(len(predictions))
        scores = [_similarity(words(said), texts, seen, prompts) for said, texts in zip(predictions, told, strict=True)]
        return np.array([[1.0, score] for score in scores])

    def combine(self, sums_RK: np.ndarray) -> Scores:
        return {"cider": sums_RK[:, 1] / sums_RK[:, 0]}


def _similarity(said: list[str], references: list[list[str]], seen: Counter[Gram], prompts: float) -> float:
    answer = _vector(said, seen, prompts)
    total = 0.0
    for reference in references:
        penalty = math.exp(-((len(said) - len(reference)) ** 2) / (2 * SIGMA**2))
        other = _vector(reference, seen, prompts)
        total += penalty * sum(map(_clipped_cosine, answer, other)) / ORDER
    return 10 * total / len(references)


def _vector(tokens: list[str], seen: Counter[Gram], prompts: float) -> Vector:
    vector: Vector = [{} for _ in range(ORDER)]
    for gram, count in Counter(grams(tokens, ORDER)).items():
        vector[len(gram) - 1][gram] = count * (prompts - math.log(max(1, seen[gram])))
    return vector


def _clipped_cosine(answer: dict[Gram, float], reference: dict[Gram, float]) -> float:
    norms = math.sqrt(sum(value**2 for value in answer.values()) * sum(value**2 for value in reference.values()))
    # Clipped at the reference's own weight, so that repeating an n-gram gains nothing (CIDEr-D).
    common = sum(min(value, reference[gram]) * reference[gram] for gram, value in answer.items() if gram in reference)
    return common / norms if norms else 0.0
