"""How near answers come to what they might have been: the corpus scores of the E2E challenge.

Each answer has one or more references, and all of them count. Words are those of mteval-v13a, in small letters; in what
order BLEU, NIST and ROUGE-L take them, github.com/tuetschek/e2e-metrics shows.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

Words = list[str]
NIST_ORDER = 5
NIST_HALF_AT = 2 / 3
"""Of the references' length: answers as short as that lose half of their NIST score."""
ROUGE_BETA = 1.2
"""How much more recall counts than precision in ROUGE-L."""


@dataclass(frozen=True)
class Scores:
    """Of all answers together; higher is better."""

    bleu: float
    """0 to 100: n-grams up to 4, brevity against the closest reference, no smoothing (aclanthology.org/P02-1040)."""
    nist: float
    """From 0: n-grams up to 5 by the bits that each tells beyond its beginning (Doddington, HLT 2002)."""
    rouge_l: float
    """0 to 100: longest common subsequence (aclanthology.org/W04-1013), the mean over answers."""


def score(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Scores of answers, of which each has at least one reference."""
    split = Tokenizer13a()
    said = [split(answer.lower()).split() for answer in answers]
    told = [[split(one.lower()).split() for one in of_answer] for of_answer in references]
    rouge = sum(_rouge_l(words, one) for words, one in zip(said, told, strict=True)) / max(len(said), 1)
    return Scores(bleu=_bleu(answers, references), nist=_nist(said, told), rouge_l=100 * rouge)


def _bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    streams = [list(stream) for stream in zip_longest(*references)]  # None where an answer has fewer
    return BLEU(lowercase=True, tokenize="13a", smooth_method="none").corpus_score(list(answers), streams).score


def _nist(said: list[Words], told: list[list[Words]]) -> float:
    known = Counter(gram for references in told for words in references for gram in _grams(words))
    known[()] = sum(len(words) for references in told for words in references)
    gained, possible = [0.0] * NIST_ORDER, [0] * NIST_ORDER
    for words, references in zip(said, told, strict=True):
        most = Counter[tuple[str, ...]]()
        for reference in references:
            most |= Counter(_grams(reference))
        for gram, count in Counter(_grams(words)).items():
            possible[len(gram) - 1] += count
            if gram in most:
                gained[len(gram) - 1] += min(count, most[gram]) * math.log2(known[gram[:-1]] / known[gram])
    total = sum(bits / count for bits, count in zip(gained, possible, strict=True) if count)
    expected = sum(sum(map(len, references)) / len(references) for references in told)
    return total * _nist_brevity(sum(map(len, said)), expected)


def _nist_brevity(length: int, expected: float) -> float:
    if not length:
        return 0.0
    strength = math.log(0.5) / math.log(NIST_HALF_AT) ** 2
    return math.exp(strength * math.log(min(1.0, length / expected)) ** 2)


def _grams(words: Words) -> Iterator[tuple[str, ...]]:
    for order in range(1, NIST_ORDER + 1):
        yield from (tuple(words[at : at + order]) for at in range(len(words) - order + 1))


def _rouge_l(words: Words, references: list[Words]) -> float:
    """F of the best precision and the best recall that any reference gives."""
    common = [_longest_common(words, reference) for reference in references]
    if not max(common):
        return 0.0
    precision = max(common) / len(words)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True) if reference)
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _longest_common(first: Words, second: Words) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)
    for word in first:
        longer = [0]
        for other, (before, above) in zip(second, pairwise(lengths), strict=True):
            longer.append(before + 1 if word == other else max(above, longer[-1]))
        lengths = longer
    return lengths[-1]
