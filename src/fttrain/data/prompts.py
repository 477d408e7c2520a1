"""Prompts to be answered: rows up to where the answer begins. Whatever else a row holds is there for a reward."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.rows import for_evaluation, unfit
from ftlaunch.rows.messages import Conversation, Turn
from ftlaunch.rows.prompts import prompt_of
from ftlaunch.rows.template import Excused, Row, Unfit
from ftlaunch.run.records import Counts
from fttrain.data.chat import Encoder
from fttrain.data.held_out import numbered
from fttrain.data.sources import load_rows
from fttrain.data.tokens import split, split_by


@dataclass(frozen=True)
class Prompt:
    """One row to be answered."""

    ids_T: np.ndarray
    """int32, up to and with what the chat template puts before an answer."""
    conversation: Conversation
    row: Row
    where: str
    """The row's place, such as "facts.jsonl:17"."""

    @property
    def turns(self) -> list[Turn]:
        return self.conversation.turns

    @property
    def text(self) -> str:
        """The last turn's."""
        return self.turns[-1]["content"]


@dataclass(frozen=True)
class Prompts:
    """The prompts of one data set."""

    train: list[Prompt]
    test: list[Prompt]
    end_ids: frozenset[int]
    """Tokens with which an answer ends."""
    counts: Counts
    """Counts of all rows; nothing of them is trained."""


def load_prompts(data: Data, tokenizer: Any, seed: int) -> Prompts:
    """Prompts of a data set; rows that are unfit or longer than its `max_length` are left out, counted in the log.

    Raises UserError where rows cannot be read, too many are unfit, or none is left.
    """
    found = _read(data, tokenizer)
    if (evaluated := for_evaluation(data)) is not None:
        return replace(found, test=_read(evaluated, tokenizer).train)
    count = len(found.train)
    if data.test_by == "prompt":
        prompts = (prompt.ids_T.tobytes() for prompt in found.train)
        train, test = split_by(numbered(prompts), data, seed)
    else:
        train, test = split(count, data, seed)
    return replace(found, train=[found.train[row] for row in train], test=[found.train[row] for row in test])


def _read(data: Data, tokenizer: Any) -> Prompts:
    """All prompts, none of them held out."""
    encoder, left_out = Encoder(tokenizer, data), unfit.UnfitRows()
    kept: list[Prompt] = []
    rows = 0
    for where, row in load_rows(data):
        rows += 1
        try:
            kept.append(_prompt(data, encoder, where, row))
        except Unfit as error:
            left_out.add(error)
    left_out.require_few(data, rows)
    if not kept:
        message = f"{data.path}: none of the {rows} rows has a prompt of at most {data.max_length} tokens"
        raise UserError(message, "raise max_length or mend the rows")
    counts = Counts(
        rows=rows,
        kept=len(kept),
        tokens=sum(len(prompt.ids_T) for prompt in kept),
        unfit=dict(left_out.unfit),
        excused=dict(left_out.excused),
        examples=left_out.examples,
    )
    return Prompts(kept, [], encoder.end_ids, counts)


def _prompt(data: Data, encoder: Encoder, where: str, row: Row) -> Prompt:
    conversation = prompt_of(data, row, where)
    ids = encoder.encode_prompt(conversation, where)
    if len(ids) > data.max_length:
        raise Excused(where, "its prompt is longer than max_length", "raise max_length")
    return Prompt(np.array(ids, dtype=np.int32), conversation, row, where)
