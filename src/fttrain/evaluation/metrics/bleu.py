"""BLEU with all references, as sacreBLEU counts."""

import numpy as np
from sacrebleu.metrics.bleu import BLEU

from fttrain.evaluation.metrics.additive import AdditiveMetric, Scores, ratio

ORDER = 4


class Bleu(AdditiveMetric):
    """`bleu`, 0 to 100: n-grams up to 4, brevity against the closest reference, no smoothing, in lower case."""

    source = "aclanthology.org/P02-1040; aclanthology.org/W18-6319"

    def statistics(self, predictions: list[str], references: list[list[str]]) -> np.ndarray:
        counter = BLEU(lowercase=True, tokenize="13a", smooth_method="none", effective_order=True)
        counted = [counter.sentence_score(text, told) for text, told in zip(predictions, references, strict=True)]
        rows = [[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in counted]
        return np.array(rows, dtype=np.float64)

    def combine(self, sums_RK: np.ndarray) -> Scores:
        matched, possible, (said, told) = sums_RK[:, :ORDER], sums_RK[:, ORDER : 2 * ORDER], sums_RK[:, -2:].T
        # The geometric mean of an n-gram order without a match is exp(log 0) = 0, which is what "no smoothing" means.
        with np.errstate(divide="ignore"):
            precision = np.exp(np.log(ratio(matched, possible)).mean(1))
            brevity = np.exp(np.minimum(0.0, 1 - np.divide(told, said, out=np.full(len(said), np.inf), where=said > 0)))
        return {"bleu": 100 * brevity * precision}
