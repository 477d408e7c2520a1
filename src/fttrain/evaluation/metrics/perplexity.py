"""Cross-entropy and perplexity of the references."""

import datasets
import numpy as np

from fttrain.evaluation.metrics.additive import AdditiveMetric, Scores


class Perplexity(AdditiveMetric):
    """`loss`, in nats per token, and `perplexity` of the references' tokens, each token with the same weight; lower is
    better. A prediction is a reference's negative log-likelihood, and its reference the number of its tokens."""

    prediction, reference = datasets.Value("float64"), datasets.Value("int64")

    def statistics(self, predictions: list[float], references: list[int]) -> np.ndarray:
        return np.array([predictions, references], dtype=np.float64).T

    def combine(self, sums_RK: np.ndarray) -> Scores:
        loss = sums_RK[:, 0] / sums_RK[:, 1]
        with np.errstate(over="ignore"):
            return {"loss": loss, "perplexity": np.exp(loss)}
