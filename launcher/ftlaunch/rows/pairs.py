"""A row of preference data → the two conversations that are compared, or why there are none."""

import math
import re
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, cast

from ftlaunch.recipe import Data
from ftlaunch.rows.conversations import Turn, entries_of, finished, message_turns, row_format
from ftlaunch.rows.template import DataError, Row, fill, kind_of, shown, template_fields, text_at, value_at

Unfit = Literal["empty", "identical", "tied", "unmatched"]
"""Why a row makes no pair: an answer is empty, both are the same, all are rated alike, or their prompts differ."""

SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
"""The form of Anthropic's HH data: "\\n\\nHuman: …\\n\\nAssistant: …"."""


@dataclass(frozen=True)
class Pair:
    """Two conversations that differ in their last turn, the assistant's."""

    chosen: list[Turn]
    rejected: list[Turn]
    margin: float
    """How much better the chosen answer is."""


def pair_of(data: Data, row: Row, where: str) -> Pair | Unfit:
    """The pair of a row of format "preference" or "ratings". Raises DataError naming `where` and what is wrong."""
    found = _from_ratings(data, row, where) if row_format(data) == "ratings" else _from_preference(data, row, where)
    if isinstance(found, str):
        return found
    answers = [turns[-1]["content"].strip() for turns in (found.chosen, found.rejected)]
    if not all(answers):
        return "empty"
    if found.chosen[:-1] != found.rejected[:-1]:
        return "unmatched"
    if answers[0] == answers[1]:
        return "identical"
    chosen, rejected = (finished(turns, data, row, where) for turns in (found.chosen, found.rejected))
    return Pair(chosen, rejected, found.margin)


def _from_preference(data: Data, row: Row, where: str) -> Pair | Unfit:
    margin = 1.0 if data.margin_field is None else _number(row, (data.margin_field,), where)
    if margin < 0:
        raise DataError(where, f"field {data.margin_field} is below 0", "swap chosen and rejected, or mend the number")
    chosen, rejected = _side(data, "chosen", row, where), _side(data, "rejected", row, where)
    if not chosen or not rejected:
        return "empty"
    prompt = _prompt(data, row, where)
    if prompt is None and data.template == "none" and isinstance(chosen, str) and isinstance(rejected, str):
        return _plain(chosen, rejected, margin, where)
    return Pair(_conversation(chosen, prompt, where), _conversation(rejected, prompt, where), margin)


def _from_ratings(data: Data, row: Row, where: str) -> Pair | Unfit:
    """The best and the worst answer, the first of each where several are rated alike."""
    assert data.prompt is not None
    field = data.answers_field
    paths = [(field, str(index)) for index in range(len(entries_of(row, field, where)))]
    ratings = [_number(row, (*path, data.rating_field), where) for path in paths]
    if min(ratings) == max(ratings):
        return "tied"
    best, worst = (paths[ratings.index(rating)] for rating in (max(ratings), min(ratings)))
    prompt = {"role": "user", "content": fill(data.prompt, row, where)}
    answers = [_text(row, (*path, data.answer_field), where) for path in (best, worst)]
    chosen, rejected = ([prompt, _answer(text)] for text in answers)
    return Pair(chosen, rejected, max(ratings) - min(ratings))


def _side(data: Data, key: Literal["chosen", "rejected"], row: Row, where: str) -> str | list[Turn]:
    """An answer as the row has it: text, or turns; empty where there is nothing in it."""
    template = data.chosen if key == "chosen" else data.rejected
    if template is not None:
        paths = template_fields(template)
        return "" if any(_is_blank(row, path, where) for path in paths) else fill(template, row, where)
    if isinstance(value_at(row, (key,), where), list):
        return message_turns(row, key, where, may_be_blank=True)
    return _text(row, (key,), where)


def _is_blank(row: Row, path: tuple[str, ...], where: str) -> bool:
    value = value_at(row, path, where)
    return isinstance(value, str) and not value.strip()


def _prompt(data: Data, row: Row, where: str) -> list[Turn] | None:
    """The turns before the answer; None where the row holds them in its answers."""
    if data.prompt is not None:
        text = fill(data.prompt, row, where)
    elif row.get("prompt") is None:
        return None
    elif isinstance(row["prompt"], list):
        return message_turns(row, "prompt", where)
    else:
        text = text_at(row, ("prompt",), where)
    turns = _dialogue(text) or [{"role": "user", "content": text}]
    return turns[:-1] if turns[-1] == _answer("") else turns


def _conversation(side: str | list[Turn], prompt: list[Turn] | None, where: str) -> list[Turn]:
    """Prompt and answer. What begins with the user's or a system turn is whole by itself."""
    turns = (_dialogue(side) or [_answer(side)]) if isinstance(side, str) else side
    if turns[0]["role"] != "assistant":
        return turns
    if prompt is None:
        remedy = 'add a field "prompt", name it with prompt = "{…}", or begin chosen and rejected with the user\'s turn'
        raise DataError(where, "the pair has no prompt", remedy)
    return [*prompt, *turns]


def _dialogue(text: str) -> list[Turn]:
    """The turns of a text in which Human: and Assistant: take turns; none in any other text."""
    before, *parts = SPEAKER.split(text)
    if before.strip():
        return []
    return [{"role": ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _plain(chosen: str, rejected: str, margin: float, where: str) -> Pair | Unfit:
    """Texts without turns: their prompt is what both begin with, up to the last space."""
    same = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    if chosen == rejected:
        return "identical"
    end = chosen.rfind(" ", 0, same)
    if end < 1:
        remedy = 'give the prompt a field of its own, "prompt", or name it with prompt = "{…}"'
        raise DataError(where, "chosen and rejected have no beginning in common that could be the prompt", remedy)
    prompt = {"role": "user", "content": chosen[:end]}
    return Pair([prompt, _answer(chosen[end:])], [prompt, _answer(rejected[end:])], margin)


def _answer(text: str) -> Turn:
    return {"role": "assistant", "content": text}


def _text(row: Row, path: tuple[str, ...], where: str) -> str:
    """The text at a path, empty where there is nothing but space."""
    return "" if _is_blank(row, path, where) else text_at(row, path, where)


def _number(row: Row, path: tuple[str, ...], where: str) -> float:
    value = cast(object, value_at(row, path, where))
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        shown_value = repr(value) if isinstance(value, str | float) else kind_of(value)
        raise DataError(where, f"field {shown(path)} is {shown_value}, not a number", "mend or leave out such rows")
    return number
