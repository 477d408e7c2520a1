"""A row of preference data → the two conversations that are compared."""

import math
import re
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, cast

from ftlaunch.recipe.data import Data
from ftlaunch.rows.conversations import LISTS, answer, finished, row_format, turns_of, user
from ftlaunch.rows.messages import Conversation, Turn, entries_of, is_full, message_turns, parsed, turns_in
from ftlaunch.rows.template import (
    DataError,
    Excused,
    Row,
    Unfit,
    fill,
    kind_of,
    shown,
    template_fields,
    text_at,
    value_at,
)

# Only at the start or after a blank line: "Human:" within a sentence is no turn.
SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
"""The form of Anthropic's HH data: "\\n\\nHuman: …\\n\\nAssistant: …"."""

TWO_ANSWERS = "a pair has one prompt, and two answers of which one is better: mend such rows or leave them out"


@dataclass(frozen=True)
class Pair:
    """Two conversations that differ in their last turn, the assistant's."""

    chosen: Conversation
    rejected: Conversation
    margin: float
    """How much better the chosen answer is."""


def pair_of(data: Data, row: Row, where: str) -> Pair:
    """The pair of a row of format "preference" or "ratings".

    Raises Unfit naming `where` and what is wrong; that no answer is the better one is no mistake.
    """
    found = _from_ratings(data, row, where) if row_format(data) == "ratings" else _from_preference(data, row, where)
    ends = [found.chosen.turns[-1], found.rejected.turns[-1]]
    # Comes first, since two empty answers are the same as well, and that would be excused.
    if not all(map(is_full, ends)):
        raise Unfit(where, "an answer is empty", TWO_ANSWERS)
    if found.chosen.turns[:-1] != found.rejected.turns[:-1]:
        raise Unfit(where, "its two answers have different prompts", TWO_ANSWERS)
    if _stripped(ends[0]) == _stripped(ends[1]):
        raise Excused(where, "its two answers are the same", TWO_ANSWERS)
    chosen, rejected = (finished(side, data, row, where) for side in (found.chosen, found.rejected))
    return Pair(chosen, rejected, found.margin)


def _stripped(turn: Turn) -> Turn:
    return {**turn, "content": turn["content"].strip()}


def _from_preference(data: Data, row: Row, where: str) -> Pair:
    margin = 1.0 if data.margin_field is None else number_at(row, (data.margin_field,), where)
    if margin < 0:
        remedy = "mend the number, or name the field as preference_field: the answers then swap where it is below 0"
        raise Unfit(where, f"field {data.margin_field} is below 0", remedy)
    better: Side = ("chosen", data.chosen)
    worse: Side = ("rejected", data.rejected)
    if data.preference_field is not None:
        margin = number_at(row, (data.preference_field,), where)
        if margin == 0:
            raise Excused(where, f"field {data.preference_field} is 0: no answer is the better one", TWO_ANSWERS)
        better, worse = (better, worse) if margin > 0 else (worse, better)
    chosen, rejected = _side(better, row, where), _side(worse, row, where)
    if not chosen or not rejected:
        raise Unfit(where, "an answer is empty", TWO_ANSWERS)
    prompt = _prompt(data, row, where)
    if prompt is None and data.template == "none" and isinstance(chosen, str) and isinstance(rejected, str):
        return _plain(chosen, rejected, abs(margin), where)
    return Pair(_conversation(chosen, prompt, where), _conversation(rejected, prompt, where), abs(margin))


Side = tuple[Literal["chosen", "rejected"], str | None]
"""A field, and the template that counts instead of it."""


def _from_ratings(data: Data, row: Row, where: str) -> Pair:
    """The best and the worst answer, the first of each where several are rated alike."""
    field = data.answers_field
    paths = [(field, str(index)) for index in range(len(entries_of(row, field, where)))]
    ratings = [number_at(row, (*path, data.rating_field), where) for path in paths]
    if min(ratings) == max(ratings):
        raise Excused(where, "its answers are all rated alike", TWO_ANSWERS)
    order = (min(ratings), max(ratings)) if data.best_rating == "lowest" else (max(ratings), min(ratings))
    best, worst = (paths[ratings.index(rating)] for rating in order)
    texts = [_text(row, (*path, data.answer_field), where) for path in (best, worst)]
    prompt = _prompt(data, row, where)
    if prompt is None:
        raise DataError(where, "the ratings have no prompt", 'name it with prompt = "{…}"')
    chosen, rejected = (prompt.followed_by(Conversation([answer(text)])) for text in texts)
    return Pair(chosen, rejected, max(ratings) - min(ratings))


def _side(side: Side, row: Row, where: str) -> str | Conversation:
    """An answer as the row has it: text, or turns; empty where there is nothing in it."""
    key, template = side
    if template is not None:
        paths = template_fields(template)
        return "" if any(_is_empty(row, path, where) for path in paths) else fill(template, row, where)
    value = turns_in(value_at(row, (key,), where))
    if isinstance(value, list):
        return message_turns(row, key, where, may_be_blank=True)
    if isinstance(value, dict):
        return message_turns({**row, key: [value]}, key, where, may_be_blank=True)
    return _text(row, (key,), where)


def _is_empty(row: Row, path: tuple[str, ...], where: str) -> bool:
    value = value_at(row, path, where)
    return isinstance(value, str) and not value.strip()


def _prompt(data: Data, row: Row, where: str) -> Conversation | None:
    """The turns before the answer; None where the row holds them in its answers."""
    if data.prompt is None and row.get("prompt") is None:
        return _turns_before(row, where)
    return turns_of(row, "prompt", data.prompt, _asked, where)


def _asked(text: str) -> list[Turn]:
    """The turns of a prompt that is a text."""
    turns = _dialogue(text) or [user(text)]
    # A prompt of HH data ends with "\n\nAssistant:", which only opens the answer.
    return turns[:-1] if turns[-1] == answer("") else turns


def _turns_before(row: Row, where: str) -> Conversation | None:
    """The turns of a field of their own that an answer follows, as LLaMA-Factory has pairs; None without such."""
    named = next((name for name in LISTS if isinstance(turns_in(row.get(name)), list)), None)
    try:
        found = None if named is None else message_turns(row, named, where)
    except Unfit:  # answers that hold their prompt need none
        return None
    return None if found is None or found.turns[-1]["role"] == "assistant" else found


def _conversation(side: str | Conversation, prompt: Conversation | None, where: str) -> Conversation:
    """Prompt and answer. What begins with the user's or a system turn is whole by itself."""
    found = Conversation(_dialogue(side) or [answer(side)]) if isinstance(side, str) else side
    if found.turns[0]["role"] != "assistant":
        return found
    if prompt is None:
        remedy = 'add a field "prompt", name it with prompt = "{…}", or begin chosen and rejected with the user\'s turn'
        raise Unfit(where, "the pair has no prompt", remedy)
    return prompt.followed_by(found)


def _dialogue(text: str) -> list[Turn]:
    """The turns of a text in which Human: and Assistant: take turns; none in any other text."""
    # With its one group `split` gives text, speaker, text, speaker, …: first what stands before all speakers.
    before, *parts = SPEAKER.split(text)
    if before.strip():
        return []
    return [{"role": ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _plain(chosen: str, rejected: str, margin: float, where: str) -> Pair:
    """Texts without turns: their prompt is what both begin with, up to the last space."""
    same = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    if chosen == rejected:
        raise Excused(where, "its two answers are the same", TWO_ANSWERS)
    # The space goes to the answer, as tokenizers have it in front of a word.
    end = chosen.rfind(" ", 0, same)
    if end < 1:
        remedy = 'give the prompt a field of its own, "prompt", or name it with prompt = "{…}"'
        raise Unfit(where, "chosen and rejected have no beginning in common that could be the prompt", remedy)
    first, second = (Conversation([user(chosen[:end]), answer(text[end:])]) for text in (chosen, rejected))
    return Pair(first, second, margin)


def _text(row: Row, path: tuple[str, ...], where: str) -> str:
    """The text at a path, empty where there is nothing but space."""
    return "" if _is_empty(row, path, where) else text_at(row, path, where)


def number_at(row: Row, path: tuple[str, ...], where: str) -> float:
    """The number at a path of the row, which may be written as text. Raises Unfit where it is none, or not finite."""
    value = cast(object, value_at(row, path, where))
    try:
        # A CSV file holds numbers as text. True is an int in Python and no rating.
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except OverflowError as error:
        raise Unfit(where, f"field {shown(path)} is too large a number", "mend or leave out such rows") from error
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        shown_value = repr(value) if isinstance(value, str | float) else kind_of(value)
        raise Unfit(where, f"field {shown(path)} is {shown_value}, not a number", "mend or leave out such rows")
    return number


def is_good(data: Data, row: Row, where: str) -> bool:
    """Whether the answer of a row of format "unpaired" is a good one. Raises Unfit."""
    value = cast(object, value_at(row, (data.label_field,), where))
    # A CSV file's "True", "FALSE" and "1" are JSON in lower case.
    value = parsed(value.lower()) if isinstance(value, str) else value
    if value not in (0, 1):
        problem = f"field {data.label_field} is {value!r}, neither true nor false"
        raise Unfit(where, problem, "name the label's field with label_field, and mend such rows")
    return bool(value)
