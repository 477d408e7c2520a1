"""METEOR without synonyms, which would need WordNet's data."""

from typing import Any

from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import meteor_score

from fttrain.evaluation.metrics.additive import MeanMetric
from fttrain.evaluation.words import words


class MeteorStem(MeanMetric):
    """`meteor_stem`, 0 to 100: METEOR as nltk counts it, by equal words and equal Porter stems, the best of the
    references, the mean over answers."""

    names = ("meteor_stem",)
    source = "aclanthology.org/W05-0909; aclanthology.org/W07-0734"

    def values(self, prediction: str, reference: list[str]) -> tuple[float, ...]:
        synonyms: Any = _NoSynonyms
        told = [words(text) for text in reference]
        # nltk takes the best of an answer's references by itself.
        return (meteor_score(told, words(prediction), stemmer=_STEMMER, wordnet=synonyms),)


class _NoSynonyms:
    """Stands for WordNet, which is asked for what a word means."""

    @staticmethod
    def synsets(word: str) -> list[Any]:  # noqa: ARG004 WordNet's
        return []


_STEMMER = PorterStemmer()
