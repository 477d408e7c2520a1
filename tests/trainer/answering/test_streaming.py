"""Answers made side by side and told piece by piece: the same as alone, cut where they should be, in whole letters."""

import io
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.tools.test_tools import greedy

from ftlaunch.errors import UserError
from ftlaunch.tools import ChatOptions
from fttrain.answering.conversation import prompt_ids
from fttrain.answering.streaming import Request, Text, answer_together
from fttrain.data.chat import end_ids
from fttrain.tools import chat
from fttrain.tools.output import answer


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    return chat.load(str(tiny_model))


def ask(loaded: tuple[Any, Any], *prompts: str, **fields: Any) -> list[tuple[str, Request]]:
    """What is said to each prompt, all of them asked at once."""
    model, tokenizer = loaded
    said: list[list[str]] = [[] for _ in prompts]
    requests = [
        Request(tokenizer(prompt)["input_ids"], **{"max_new_tokens": 12, "say": pieces.append, **fields})
        for prompt, pieces in zip(prompts, said, strict=True)
    ]
    answer_together(model, tokenizer, requests, end_ids(tokenizer))
    return [("".join(pieces), request) for pieces, request in zip(said, requests, strict=True)]


def test_side_by_side_each_gets_the_greedy_answer_that_it_gets_alone(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompts = ("red", "a much longer question about kettles", "salt and")
    for (text, request), prompt in zip(ask(loaded, *prompts), prompts, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        expected = greedy(model, ids, 12)[len(ids) :]
        ended = next((at for at, token in enumerate(expected) if token in end_ids(tokenizer)), len(expected))
        assert text.replace("\ufffd", "") == tokenizer.decode(expected[:ended], skip_special_tokens=True).replace(
            "\ufffd", ""
        )
        assert request.tokens == ended
        assert request.finish == ("stop" if ended < len(expected) else "length")


def test_each_request_has_its_own_length_and_its_own_draws(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = tokenizer("red")["input_ids"]
    texts: list[list[str]] = [[] for _ in range(4)]
    draws = [(5.0, 1), (5.0, 1), (5.0, 2), (0.0, None)]
    requests = [
        Request(ids, 3 + at, pieces.append, temperature=temperature, seed=seed)
        for at, (pieces, (temperature, seed)) in enumerate(zip(texts, draws, strict=True))
    ]
    answer_together(model, tokenizer, requests, frozenset({tokenizer.eos_token_id}))
    assert [request.tokens for request in requests] == [3, 4, 5, 6]
    first, second, third, _ = ("".join(pieces) for pieces in texts)
    assert second.startswith(first)
    assert not third.startswith(first)


def test_top_p_leaves_only_the_likeliest(loaded: tuple[Any, Any]) -> None:
    ((drawn, _),) = ask(loaded, "red", temperature=3.0, top_p=1e-6, seed=3)
    ((greedy_text, _),) = ask(loaded, "red")
    assert drawn == greedy_text


def test_who_cancels_or_is_late_gets_no_more(loaded: tuple[Any, Any]) -> None:
    ((_, request),) = ask(loaded, "red", deadline=time.monotonic() - 1)
    assert request.tokens <= 1
    gone = Request([1, 2, 3], 50, lambda _: None)
    gone.cancelled.set()
    stays = Request([1, 2, 3], 5, lambda _: None)
    answer_together(*loaded, [gone, stays], end_ids(loaded[1]))
    assert gone.tokens <= 1


class Letters:
    """A tokenizer of bytes."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:  # noqa: ARG002
        return bytes(ids).decode(errors="replace")


def told(text: str, *stop: str) -> tuple[list[str], bool]:
    made = Text(Letters(), stop)
    pieces = [made.add(byte) for byte in text.encode() if not made.stopped]
    return [piece for piece in [*pieces, made.rest()] if piece], made.stopped


def test_no_half_character_is_told() -> None:
    assert told("añ→😀!") == (["a", "ñ", "→", "😀", "!"], False)


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stopped"),
    [
        ("one END two", ("END",), "one ", True),
        ("one EN two", ("END",), "one EN two", False),
        ("one EN", ("END",), "one EN", False),
        ("aaab", ("aab",), "a", True),
        ("x\n\ny", ("###", "\n\n"), "x", True),
    ],
)
def test_a_stop_text_ends_the_answer_and_is_not_told(
    text: str, stop: tuple[str, ...], expected: str, stopped: bool
) -> None:
    pieces, was_stopped = told(text, *stop)
    assert ("".join(pieces), was_stopped) == (expected, stopped)


def test_a_conversation_keeps_its_history_until_it_is_reset(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[dict[str, str]]] = []

    def remember(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
        asked.append([*messages])
        return prompt_ids(tokenizer, messages)

    monkeypatch.setattr(chat, "prompt_ids", remember)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand you?\n/reset\nagain\n/exit\nnever\n"))
    assert answer(chat.main, ChatOptions(models=[str(tiny_model)], max_new_tokens=4)) == 0
    assert [[turn["role"] for turn in turns] for turns in asked] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user"],
    ]
    assert asked[1][2]["content"] == "and you?"
    out = capsys.readouterr()
    assert out.out.count(f"{tiny_model}:") == 3
    assert "/reset forgets" in out.err


def test_turns_that_a_template_refuses_are_a_users_mistake(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    before = tokenizer.chat_template
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(UserError, match="roles must alternate"):
            prompt_ids(tokenizer, [{"role": "user", "content": "x"}])
    finally:
        tokenizer.chat_template = before
    assert torch.is_grad_enabled()
