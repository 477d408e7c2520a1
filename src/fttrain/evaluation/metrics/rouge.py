"""ROUGE-1, -2, -L and -Lsum, as rouge_score counts them, with stemming."""

import re
from functools import cache

from rouge_score.rouge_scorer import RougeScorer

from fttrain.evaluation.metrics.additive import MeanMetric

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Rouge(MeanMetric):
    """`rouge1`, `rouge2`, `rougeL` and `rougeLsum`, 0 to 100: F of n-grams or of the longest common subsequence, the
    best of the references, the mean over answers; of `rougeLsum` by sentence."""

    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    source = "aclanthology.org/W04-1013"

    def values(self, prediction: str, reference: list[str]) -> tuple[float, ...]:
        best = _scorer().score_multi([_by_sentence(text) for text in reference], _by_sentence(prediction))
        return tuple(best[name].fmeasure for name in self.names)


@cache
def _scorer() -> RougeScorer:
    """Made once: its stemmer keeps what it has stemmed."""
    return RougeScorer([*Rouge.names], use_stemmer=True)


def _by_sentence(text: str) -> str:
    """A sentence on each line, which is what ROUGE-Lsum goes by."""
    return SENTENCE_END.sub("\n", text)
