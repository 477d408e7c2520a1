"""Whether a rendered conversation holds what its row holds: a template that leaves something out is found here."""

import json
import re
from collections.abc import Iterator
from typing import Any

from ftlaunch.rows.messages import REASONING, Conversation, Turn

WORD = re.compile(r"[A-Za-z0-9_]+")


def left_out_of_answer(turn: Turn, text: str) -> str | None:
    """What an assistant turn says and the text that is trained for it does not: its words, a thought or a call."""
    if not stands_in(turn["content"], text):
        return "what the answer says"
    if any(not stands_in(str(turn[key]), text) for key in REASONING if turn.get(key)):
        return "the thought before the answer"
    return None if _has_calls(turn, text) else "a tool call"


def is_respaced(turn: Turn, text: str) -> bool:
    """Whether a text that holds what a turn says holds it with other white space, such as without its indentation."""
    return not _is_written(turn["content"], text)


def left_out_of_prompt(conversation: Conversation, text: str) -> str | None:
    """Which turn of system, user or tool, which call or which definition of a tool the whole text does not hold."""
    for turn in conversation.turns:
        if turn["role"] != "assistant" and not stands_in(turn["content"], text):
            return f"the {turn['role']} turn"
    if not all(_names(name, text) for name in _tool_names(conversation.fields.get("tools", ()))):
        return "the definitions of tools"
    # What earlier answers say may be cut: some templates leave out their thoughts. Their calls may not.
    return None if all(_has_calls(turn, text) for turn in conversation.turns) else "a tool call"


def _has_calls(turn: Turn, text: str) -> bool:
    functions = (call["function"] for call in turn.get("tool_calls", ()))
    return all(
        _names(value, text) for function in functions for value in (function["name"], *_values(function["arguments"]))
    )


def _names(said: str, text: str) -> bool:
    """`stands_in` of a name or a value, which is no name where it is only part of a word, as `f` is of `of`."""
    if not WORD.fullmatch(said.strip()):
        return stands_in(said, text)
    return re.search(rf"(?<![A-Za-z0-9_]){said.strip()}(?![A-Za-z0-9_])", text) is not None


def stands_in(said: str, text: str) -> bool:
    """Whether a text holds another, as it is, as JSON writes it, or but for white space, which templates trim."""
    return _is_written(said.strip(), text) or "".join(said.split()) in "".join(text.split())


def _is_written(said: str, text: str) -> bool:
    return said in text or any(json.dumps(said, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))


def _values(arguments: object) -> Iterator[str]:
    """The texts and numbers of a call's arguments."""
    match arguments:
        case dict():
            for key, value in arguments.items():
                yield str(key)
                yield from _values(value)
        case list():
            for value in arguments:
                yield from _values(value)
        case str():
            yield arguments
        case bool() | None:
            return  # templates write true as JSON or as Python does
        case _:
            yield str(arguments)


def _tool_names(tools: Any) -> Iterator[str]:
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str):
            yield name
