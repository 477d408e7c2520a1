"""What a template leaves out of a conversation is found, however short it is."""

from typing import Any

import pytest

from ftlaunch.rows.messages import Conversation
from fttrain.data.audit import left_out_of_answer, left_out_of_prompt

CALL: dict[str, Any] = {"function": {"name": "f", "arguments": {"x": 1}}}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "of course"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "r"},
    {"role": "assistant", "content": "done"},
]
WITHOUT_CALL = "user: of course, 10 times\nassistant:\ntool: r\nassistant: done"


@pytest.mark.parametrize(
    ("text", "tools", "lost"),
    [
        (WITHOUT_CALL, [], "a tool call"),
        (WITHOUT_CALL.replace("assistant:\n", "assistant: f(x=1)\n"), [], None),
        (WITHOUT_CALL.replace("assistant:\n", "assistant: f(x=1)\n"), [{"name": "g"}], "the definitions of tools"),
        ("g, f" + WITHOUT_CALL.replace("assistant:\n", "assistant: f(x=1)\n"), [{"name": "g"}], None),
    ],
)
def test_calls_of_earlier_turns_and_tools(text: str, tools: list[Any], lost: str | None) -> None:
    assert left_out_of_prompt(Conversation(TURNS, {"tools": tools}), text) == lost


def test_a_call_whose_name_is_part_of_a_word_is_left_out() -> None:
    assert left_out_of_answer(TURNS[1], "offer 1x") == "a tool call"
    assert left_out_of_answer(TURNS[1], '{"name": "f", "arguments": {"x": 1}}') is None
