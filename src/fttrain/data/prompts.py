"""Prompts to be answered: rows up to where the answer begins. Whatever else a row holds is there for a reward."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ftlaunch.errors import UserError
from ftlaunch.recipe import Data
from ftlaunch.rows.conversations import Turn
from ftlaunch.rows.prompts import prompt_of
from ftlaunch.rows.template import Row
from fttrain.data.chat import Encoder
from fttrain.data.sources import load_rows
from fttrain.data.tokens import split

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One row to be answered."""

    ids_T: np.ndarray
    """int32, up to and with what the chat template puts before an answer."""
    turns: list[Turn]
    row: Row
    where: str
    """The row's place, such as "facts.jsonl:17"."""

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
    left_out: int
    """Rows whose prompt is longer than `max_length`, or that are pairs without a common one."""


def load_prompts(datas: Sequence[Data], tokenizer: Any, seed: int) -> list[Prompts]:
    """Prompts of each data set; those longer than its `max_length` are left out, and counted in the log.

    Raises UserError where rows cannot be read or encoded, or none is left.
    """
    return [_load(data, tokenizer, seed) for data in datas]


def _load(data: Data, tokenizer: Any, seed: int) -> Prompts:
    encoder = Encoder(tokenizer, data)
    read = [_prompt(data, encoder, where, row) for where, row in load_rows(data)]
    found = [prompt for prompt in read if prompt is not None]
    kept = [prompt for prompt in found if len(prompt.ids_T) <= data.max_length]
    counts = (data.path, len(kept), len(found) - len(kept), len(read) - len(found))
    log.info("%s: %d prompts; %d are longer than max_length, %d rows hold none", *counts)
    if not kept:
        message = f"{data.path}: none of the {len(read)} rows has a prompt of at most {data.max_length} tokens"
        raise UserError(message, "raise max_length or mend the rows")
    train, test = split(len(kept), data, seed)
    return Prompts([kept[row] for row in train], [kept[row] for row in test], encoder.end_ids, len(read) - len(kept))


def _prompt(data: Data, encoder: Encoder, where: str, row: Row) -> Prompt | None:
    """None where a row of pairs has no prompt that both answers share."""
    turns = prompt_of(data, row, where)
    if isinstance(turns, str):
        return None
    return Prompt(np.array(encoder.encode_prompt(turns, where), dtype=np.int32), turns, row, where)
