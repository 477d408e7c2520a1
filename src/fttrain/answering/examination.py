"""What metrics are given of a model: its answers to the prompts held out, and how likely it finds what is right."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.stages import Need
from fttrain.answering.choices import Question, questions
from fttrain.answering.generation import Decoding, reply
from fttrain.answering.likelihood import Likelihood, Row, likelihoods
from fttrain.data.chat import Encoder
from fttrain.data.token_set import PairSet, TokenSet
from fttrain.data.tokens import cache_root, tokenize
from fttrain.evaluation.prompts import HeldOutPrompt, held_out_prompts
from fttrain.evaluation.scoring import Inputs

T = TypeVar("T")
R = TypeVar("R")
Share = Callable[[Sequence[T], Callable[[Sequence[T]], Iterable[Mapping[int, R]]]], list[R]]
"""Has work done on items, of which it is given some and yields results by their places; all results, in order."""


@dataclass(frozen=True)
class Exam:
    """What is asked of every model with one tokenizer."""

    asked: list[HeldOutPrompt] = field(default_factory=list[HeldOutPrompt])
    """Prompts to be answered, each with all its references."""
    references: list[Row] = field(default_factory=list[Row])
    choices: list[Question] = field(default_factory=list[Question])
    pairs: list[tuple[Row, Row]] = field(default_factory=list[tuple[Row, Row]])
    """Chosen and rejected."""
    end_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Examined:
    """What came of it."""

    inputs: dict[Need, Inputs]
    answers: list[str]


def set_exam(
    data: Data,
    tokenizer: Any,
    seed: int,
    needs: set[Need],
    *,
    most: int | None = None,
    choices_field: str | None = None,
    label_field: str | None = None,
) -> Exam:
    """The rows held out, or all where none is, as far as metrics need them; at most so many of each kind.

    Raises UserError where the rows cannot be read, or are not of the kind that is needed.
    """
    rows = tokenize(data, tokenizer, seed, cache_root()) if needs - {"choices"} else None
    # Rows of a set from which nothing is held out are all asked: such a set is given to be evaluated on.
    held_out = None if rows is None else rows.test if len(rows.test) else rows.train
    asked = held_out_prompts(rows, tokenizer)[:most] if rows is not None and "answers" in needs else []
    references = list(_rows(held_out))[:most] if "references" in needs else []
    pairs = list(_pairs(held_out))[:most] if "pairs" in needs else []
    choices: list[Question] = []
    if "choices" in needs:
        if choices_field is None or label_field is None:
            raise UserError("multiple_choice does not know the choices", "give choices_field and label_field")
        choices = questions(data, tokenizer, seed, choices_field, label_field)[:most]
    return Exam(asked, references, choices, pairs, Encoder(tokenizer, data).end_ids)


def _rows(held_out: object) -> Iterator[Row]:
    assert isinstance(held_out, TokenSet), "perplexity is of rows, not of pairs"
    yield from (Row(*held_out.row(index)) for index in range(len(held_out)))


def _pairs(held_out: object) -> Iterator[tuple[Row, Row]]:
    if not isinstance(held_out, PairSet):
        raise UserError("preference_accuracy needs pairs of answers", 'name data of format "preference" or "ratings"')
    for index in range(len(held_out)):
        chosen, rejected = held_out.group(index).rows
        yield Row(*chosen), Row(*rejected)


def examine(model: Any, tokenizer: Any, exam: Exam, decoding: Decoding, share: Share[Any, Any]) -> Examined:
    """Put the exam to a model; the same on every rank that shares the work."""
    inputs: dict[Need, Inputs] = {}
    answers: list[str] = []
    if exam.asked:
        prompts = [one.ids_T for one in exam.asked]
        answers = share(prompts, lambda some: reply(model, tokenizer, some, exam.end_ids, decoding))
        inputs["answers"] = Inputs(answers, [one.references for one in exam.asked])

    def likely(rows: list[Row]) -> list[Likelihood]:
        return share(rows, lambda some: likelihoods(model, some))

    if exam.references:
        found = likely(exam.references)
        inputs["references"] = Inputs([-one.logp for one in found], [one.tokens for one in found])
    if exam.choices:
        # All choices of all questions in one go, so that rows of like length share a batch.
        found = likely([row for question in exam.choices for row in question.rows])
        inputs["choices"] = _of_choices(exam.choices, found)
    if exam.pairs:
        found = likely([row for pair in exam.pairs for row in pair])
        both = [[list(one) for one in found[at : at + 2]] for at in range(0, len(found), 2)]
        inputs["pairs"] = Inputs(both, [0] * len(both))
    return Examined(inputs, answers)


def _of_choices(asked: list[Question], found: list[Likelihood]) -> Inputs:
    told = iter(found)
    predictions = [[[next(told).logp, float(length)] for length in question.lengths] for question in asked]
    return Inputs(predictions, [question.right for question in asked])
