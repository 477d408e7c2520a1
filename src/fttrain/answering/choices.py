"""Multiple choice: the rows of a data set as prompts with choices, one of which is right."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.rows.template import DataError, template_fields, value_at
from fttrain.answering.likelihood import Row
from fttrain.data.prompts import Prompt, load_prompts

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Question(NamedTuple):
    """A prompt with each choice after it."""

    rows: list[Row]
    lengths: list[int]
    """Bytes of each choice."""
    right: int


def questions(data: Data, tokenizer: Any, seed: int, choices_field: str, label_field: str) -> list[Question]:
    """The questions held out, or all of them where none is. UserError where a row's choices or label cannot be read."""
    prompts = load_prompts(data, tokenizer, seed)
    asked = prompts.test or prompts.train
    listed = [_choices(prompt, choices_field) for prompt in asked]
    labels = [value_at(prompt.row, _path(label_field), prompt.where) for prompt in asked]
    right = right_ones(labels, listed, [prompt.where for prompt in asked])
    return [
        Question([_row(prompt, choice, tokenizer) for choice in choices], [len(c.encode()) for c in choices], place)
        for prompt, choices, place in zip(asked, listed, right, strict=True)
    ]


def _path(field: str) -> tuple[str, ...]:
    return template_fields(f"{{{field}}}")[0]


def _choices(prompt: Prompt, field: str) -> list[str]:
    value = value_at(prompt.row, _path(field), prompt.where)
    found = cast("list[object]", value) if isinstance(value, list) else []
    if len(found) < 2 or not all(isinstance(choice, str) and choice.strip() for choice in found):
        remedy = "name the field with the list of choices, as in choices or choices[text]"
        raise DataError(prompt.where, f"field {field} is no list of two or more texts", remedy)
    return [str(choice) for choice in found]


def right_ones(labels: Sequence[object], choices: Sequence[list[str]], places: Sequence[str]) -> list[int]:
    """The index of each right choice, told by index, letter or text.

    Digits as texts are indices only where they begin at "0": a "1" might as well be the first. UserError otherwise.
    """
    digits = {label for label in labels if isinstance(label, str) and label.strip().isdecimal()}
    from_zero = "0" in digits and len(digits) > 1
    found = [_right(label, among, from_zero=from_zero) for label, among in zip(labels, choices, strict=True)]
    for label, place, where in zip(labels, found, places, strict=True):
        if place is None:
            message = f"{where}: it cannot be told which choice {label!r} is"
            raise UserError(message, "a label is an index from 0, a letter, or the text of one choice")
    return [place for place in found if place is not None]


def _right(label: object, choices: list[str], *, from_zero: bool) -> int | None:
    match label:
        case bool():
            return None
        case int():
            place = label
        case str() if choices.count(label) == 1:
            return choices.index(label)
        case str() if label.strip().upper() in tuple(LETTERS):
            place = LETTERS.index(label.strip().upper())
        case str() if label.strip().isdecimal() and from_zero:
            place = int(label)
        case _:
            return None
    return place if 0 <= place < len(choices) else None


def _row(prompt: Prompt, choice: str, tokenizer: Any) -> Row:
    """The choice right after its prompt, with a space between where the prompt ends in a word."""
    ends_in_word = bool(tokenizer.decode(prompt.ids_T[-1:], skip_special_tokens=True)[-1:].strip())
    text = f" {choice}" if ends_in_word else choice
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    asked = np.zeros(len(prompt.ids_T) + len(ids), dtype=bool)
    asked[len(prompt.ids_T) :] = True
    return Row(np.concatenate([prompt.ids_T, np.array(ids, dtype=np.int32)]), asked)
