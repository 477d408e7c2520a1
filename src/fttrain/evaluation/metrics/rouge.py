"""ROUGE-1, -2, -L and -Lsum, as rouge_score counts them, with stemming."""

import re

from rouge_score.rouge_scorer import RougeScorer

from fttrain.evaluation.metrics.additive import MeanMetric, info_of_texts

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Rouge(MeanMetric):
    """`rouge1`, `rouge2`, `rougeL` and `rougeLsum`, 0 to 100: F of n-grams or of the longest common subsequence, the
    best of the references, the mean over answers; of `rougeLsum` by sentence."""

    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")

    def _info(self):
        return info_of_texts(str(self.__doc__), "aclanthology.org/W04-1013")

    def values(self, prediction: str, reference: list[str]) -> tuple[float, ...]:
        scorer = _scorer()
        best = scorer.score_multi([_by_sentence(text) for text in reference], _by_sentence(prediction))
        return tuple(best[name].fmeasure for name in self.names)


_SCORERS: list[RougeScorer] = []


def _scorer() -> RougeScorer:
    """Made once: its stemmer keeps what it has stemmed."""
    if not _SCORERS:
        _SCORERS.append(RougeScorer([*Rouge.names], use_stemmer=True))
    return _SCORERS[0]


def _by_sentence(text: str) -> str:
    """A sentence on each line, which is what ROUGE-Lsum goes by."""
    return SENTENCE_END.sub("\n", text)
