"""Texts as metrics compare them: split into words, brought to one form, searched for numbers."""

import re
import string
from collections.abc import Iterator, Sequence

from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
"""A number as GSM8K writes one: 1,234 or -0.5."""
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)

_split = Tokenizer13a()


def words(text: str) -> list[str]:
    """The words of mteval-v13a, in lower case."""
    return _split(text.lower()).split()


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and surplus space, as SQuAD and TriviaQA compare answers."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def grams(tokens: Sequence[str], most: int) -> Iterator[tuple[str, ...]]:
    """Every n-gram of up to `most` tokens."""
    for order in range(1, most + 1):
        yield from (tuple(tokens[at : at + order]) for at in range(len(tokens) - order + 1))


def last_number(text: str) -> float | None:
    """The last number in a text; None where there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
