"""A row → the text or the turns of a conversation that it stands for, in each format of `Data`."""

from collections.abc import Callable
from typing import Any, cast

from ftlaunch.recipe import Data
from ftlaunch.rows.template import DataError, Row, fill, kind_of, shown, text_at, value_at

Turn = dict[str, Any]
"""At least "role" and "content"; what else a row's message holds is handed on to the chat template."""

ROLES = ("system", "user", "assistant", "tool")
SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""ShareGPT's `from` → role."""


def row_format(data: Data) -> str:
    """The format's name; where it is left open the templates tell it."""
    return data.format or ("prompt" if data.chosen is None and data.rejected is None else "preference")


def text_of(data: Data, row: Row, where: str) -> str:
    """The text of a row of format "text". Raises DataError."""
    return text_at(row, (data.text_field,), where)


def turns_of(data: Data, row: Row, where: str) -> list[Turn]:
    """The conversation of a row of any other format, ready to render and with at least one turn.

    It may begin with one system turn, goes on with a user turn, and ends with the assistant's unless everything is
    trained. Raises DataError naming `where` and the field that is wrong.
    """
    return finished(read_turns(data, row, where), data, row, where)


def read_turns(data: Data, row: Row, where: str) -> list[Turn]:
    """The turns that stand in the row, at least one; of format "prompt" without a completion the user's alone."""
    return _READERS[row_format(data)](data, row, where)


def finished(turns: list[Turn], data: Data, row: Row, where: str) -> list[Turn]:
    """The turns, after `data.system` where they have no system turn. Raises DataError where they cannot be trained."""
    if data.system is not None and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": fill(data.system, row, where)}, *turns]
    _judge(turns, data, where)
    return turns


def _pair(user: str, assistant: str) -> list[Turn]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _from_prompt(data: Data, row: Row, where: str) -> list[Turn]:
    assert data.prompt is not None
    asked = fill(data.prompt, row, where)
    if data.completion is None:
        return [{"role": "user", "content": asked}]
    return _pair(asked, fill(data.completion, row, where))


def _from_alpaca(data: Data, row: Row, where: str) -> list[Turn]:
    """`input` may be missing, null or blank: most rows of such files have none.

    Where no template marks the turns, Alpaca's own headings do (github.com/tatsu-lab/stanford_alpaca).
    """
    parts = {"Instruction": text_at(row, ("instruction",), where)}
    extra = row.get("input")
    if extra is not None and not (isinstance(extra, str) and not extra.strip()):
        parts["Input"] = text_at(row, ("input",), where)
    plain = "\n\n".join(parts.values())
    headed = "".join(f"### {heading}:\n{text}\n\n" for heading, text in parts.items()) + "### Response:\n"
    return _pair(headed if data.template == "none" else plain, text_at(row, ("output",), where))


def _from_messages(data: Data, row: Row, where: str) -> list[Turn]:
    return message_turns(row, data.messages_field or "messages", where)


def message_turns(row: Row, field: str, where: str, *, may_be_blank: bool = False) -> list[Turn]:
    """The turns in a field that lists them as {"role": …, "content": …}; the last may be blank if so told."""
    entries = entries_of(row, field, where)
    turns: list[Turn] = []
    for index, entry in enumerate(entries):
        role = _one_of(ROLES, row, (field, str(index), "role"), where)
        content = entry.get("content")
        if not (may_be_blank and index == len(entries) - 1 and isinstance(content, str)):
            content = text_at(row, (field, str(index), "content"), where)
        turns.append({**entry, "role": role, "content": content})
    return turns


def _from_sharegpt(data: Data, row: Row, where: str) -> list[Turn]:
    field = data.messages_field or "conversations"
    turns: list[Turn] = []
    for index in range(len(entries_of(row, field, where))):
        speaker = _one_of(tuple(SPEAKERS), row, (field, str(index), "from"), where)
        turns.append({"role": SPEAKERS[speaker], "content": text_at(row, (field, str(index), "value"), where)})
    return turns


_READERS: dict[str, Callable[[Data, Row, str], list[Turn]]] = {
    "prompt": _from_prompt,
    "alpaca": _from_alpaca,
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
}


def entries_of(row: Row, field: str, where: str) -> list[Row]:
    """The turns as the row has them: a list, not empty, of objects."""
    value = cast(object, value_at(row, (field,), where))
    if not isinstance(value, list):
        raise DataError(where, f"field {field} is {kind_of(value)}, not a list of turns", _shape(field))
    entries = cast("list[object]", value)
    if not entries:
        raise DataError(where, f"field {field} is an empty list", "leave such rows out of the file")
    for entry in entries:
        if not isinstance(entry, dict):
            raise DataError(where, f"a turn in {field} is {kind_of(entry)}, not an object", _shape(field))
    return cast("list[Row]", entries)


def _shape(field: str) -> str:
    return (
        f'write {field} as [{{"role": "user", "content": "…"}}, …] for format "messages", or '
        f'[{{"from": "human", "value": "…"}}, …] for "sharegpt"'
    )


def _one_of(known: tuple[str, ...], row: Row, path: tuple[str, ...], where: str) -> str:
    speaker = value_at(row, path, where)
    if speaker not in known:
        raise DataError(where, f"field {shown(path)} is {speaker!r}", f"write one of {', '.join(known)}")
    return speaker


def _judge(turns: list[Turn], data: Data, where: str) -> None:
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if "system" in spoken:
        raise DataError(where, "a system turn stands after the first turn", "put system turns first, one a row")
    if spoken[:1] != ["user"]:
        remedy = "begin each conversation with a user turn, after the system turn if it has one"
        raise DataError(where, f"the first turn is {spoken[0] if spoken else 'system'}, not user", remedy)
    if data.train_on != "all" and spoken[-1] != "assistant":
        remedy = 'cut the row after its last assistant turn, or train everything with train_on = "all"'
        raise DataError(where, f"the last turn is {spoken[-1]}, not assistant: there is no answer to train", remedy)
