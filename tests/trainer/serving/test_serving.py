"""The server, over real sockets: what it answers, whom it refuses and in which words, and fifty clients at once."""

import http.client
import json
import queue
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.serving.conftest import serving

from ftlaunch.errors import UserError
from ftlaunch.tools import ServeOptions
from fttrain.answering.conversation import prompt_ids
from fttrain.answering.streaming import Request
from fttrain.serving.api import PAGE
from fttrain.serving.worker import Worker
from fttrain.tools import serve
from fttrain.tools.chat import say


def ask(port: int, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
    """Status and text of an answer; a dict is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    sent = json.dumps(body) if isinstance(body, dict) else body
    named = {"Content-Type": "application/json", **{key.replace("_", "-"): value for key, value in headers.items()}}
    connection.request("GET" if body is None else "POST", path, sent, named)
    response = connection.getresponse()
    return response.status, response.read().decode()


def chat(port: int, **fields: Any) -> tuple[int, dict[str, Any]]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "red"}], "temperature": 0, "max_tokens": 9}
    status, text = ask(port, "/v1/chat/completions", {**body, **fields})
    return status, json.loads(text)


def test_a_conversation_is_answered_as_chat_does(port: int, loaded: tuple[Any, Any]) -> None:
    status, answer = chat(port)
    assert (status, answer["object"], answer["model"]) == (200, "chat.completion", "tiny")
    (choice,) = answer["choices"]
    assert choice["message"]["content"].strip() == say(*loaded, [{"role": "user", "content": "red"}], 9)
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert choice["finish_reason"] in ("stop", "length")


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_streamed_answer_is_the_same_in_pieces(port: int) -> None:
    whole = chat(port)[1]["choices"][0]
    body = {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "red"}]}]}
    more = {"temperature": 0, "max_tokens": 9, "stream": True, "stream_options": {"include_usage": True}}
    status, text = ask(port, "/v1/chat/completions", body | more)
    told = events(text)
    assert status == 200
    assert told[0]["choices"][0]["delta"]["role"] == "assistant"
    pieces = [one["choices"][0]["delta"].get("content", "") for one in told if one["choices"]]
    assert "".join(pieces) == whole["message"]["content"]
    assert told[-2]["choices"][0]["finish_reason"] == whole["finish_reason"]
    assert told[-1]["usage"]["completion_tokens"] > 0


def test_a_bare_text_goes_on(port: int) -> None:
    status, text = ask(port, "/v1/completions", {"model": "tiny", "prompt": "salt", "max_tokens": 4, "seed": 3})
    again = ask(port, "/v1/completions", {"model": "tiny", "prompt": "salt", "max_tokens": 4, "seed": 3})[1]
    answer = json.loads(text)
    assert (status, answer["object"]) == (200, "text_completion")
    assert answer["choices"][0]["text"] == json.loads(again)["choices"][0]["text"]


def test_models_are_listed(port: int) -> None:
    status, text = ask(port, "/v1/models")
    assert status == 200
    assert [one["id"] for one in json.loads(text)["data"]] == ["tiny", "broken"]


def test_fifty_clients_at_once_are_all_answered(port: int) -> None:
    alone = chat(port)[1]["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: chat(port), range(50)))
    assert [status for status, _ in answers] == [200] * 50
    assert {answer["choices"][0]["message"]["content"] for _, answer in answers} == {alone}
    assert len({answer["id"] for _, answer in answers}) == 50


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"model": "other"}, 404, "there is no model 'other' here; there are: tiny, broken"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only text is understood"),
        ({"temperature": 3}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 99}, 400, "max_tokens may be 16 at most here"),
        ({"n": 2}, 400, "n is not supported"),
        ({"logprobs": True}, 400, "logprobs is not supported"),
        ({"tools": [{}]}, 400, "tools is not supported"),
        ({"typo": 1}, 400, "typo"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, 400, "the prompt has"),
        ({"model": "broken"}, 500, "the model could not answer; the server's log says why"),
    ],
)
def test_what_cannot_be_done_is_said_in_plain_words(port: int, fields: dict[str, Any], status: int, words: str) -> None:
    found, answer = chat(port, **fields)
    assert found == status
    assert words in answer["error"]["message"]
    assert "Traceback" not in json.dumps(answer)
    assert "weights" not in json.dumps(answer)


def test_keys_that_ask_for_nothing_are_taken(port: int) -> None:
    assert chat(port, n=1, presence_penalty=0, logprobs=False, user="me", stop=None, tools=None)[0] == 200


def test_a_stream_that_fails_says_so(port: int) -> None:
    body = {"model": "broken", "messages": [{"role": "user", "content": "x"}], "stream": True}
    text = ask(port, "/v1/chat/completions", body)[1]
    assert "could not answer" in text
    assert "weights" not in text


@pytest.mark.parametrize("body", ["{", '"text"', "[1]", "\x00"])
def test_what_is_no_request_is_refused(port: int, body: str) -> None:
    status, text = ask(port, "/v1/chat/completions", body)
    assert status == 400
    assert json.loads(text)["error"]["message"]


def test_a_huge_request_is_not_read(port: int) -> None:
    status, text = ask(port, "/v1/completions", "x" * 1_100_000)
    assert (status, "1,000,000 bytes" in text) == (413, True)

    def pieces() -> Iterator[bytes]:
        for _ in range(12):
            yield b"x" * 100_000

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", pieces(), {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"Host": "evil.example:80"}, "not called by that name"),
        ({"Origin": "http://evil.example"}, "pages of other sites"),
        ({"Origin": "null"}, "pages of other sites"),
        ({"Sec_Fetch_Site": "cross-site"}, "pages of other sites"),
        ({"Sec_Fetch_Site": "same-site"}, "pages of other sites"),
    ],
)
def test_pages_of_other_sites_may_not_use_it(port: int, headers: dict[str, str], words: str) -> None:
    for path, body in (("/v1/models", None), ("/v1/completions", {"model": "tiny", "prompt": "x"}), ("/", None)):
        status, text = ask(port, path, body, **headers)
        assert (status, words in text) == (403, True)


def test_its_own_page_may(port: int) -> None:
    assert ask(port, "/v1/models", Origin=f"http://127.0.0.1:{port}", Sec_Fetch_Site="same-origin")[0] == 200


def test_with_a_token_only_who_has_it_is_answered(workers: dict[str, Worker]) -> None:
    for port in serving(workers, "open sesame"):
        assert ask(port, "/v1/models")[0] == 401
        assert ask(port, "/v1/models", Authorization="Bearer open sesam")[0] == 401
        assert ask(port, "/v1/models", Authorization="Bearer open sesame")[0] == 200
        assert ask(port, "/")[0] == 200


def test_the_page_needs_no_other_site_and_says_which_script_is_its_own(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/")
    response = connection.getresponse()
    text, policy = response.read().decode(), response.headers["content-security-policy"]
    (nonce,) = set(re.findall(r'nonce="([^"]+)"', text))
    assert policy.startswith("default-src 'none'; connect-src 'self'")
    assert policy.count(f"'nonce-{nonce}'") == 2
    assert "//" not in re.sub(r"https?://127", "", PAGE.read_text()).replace("://", "")
    assert "innerHTML" not in text


def test_who_comes_first_is_answered_first(loaded: tuple[Any, Any]) -> None:
    worker = Worker("orderly", *loaded, batch_size=4, most_waiting=64)
    begun, held = threading.Event(), threading.Event()

    def hold(_: str) -> None:
        begun.set()
        held.wait(30)

    answered: list[int] = []
    red = prompt_ids(loaded[1], [{"role": "user", "content": "red"}])
    worker.submit(Request(red, 9, hold), lambda _: answered.append(-1))
    assert begun.wait(30)  # the others come while it is busy
    for number in range(50):
        worker.submit(Request([104], 1 + number % 3, lambda _: None), lambda _, number=number: answered.append(number))
    held.set()
    while len(answered) < 51:
        time.sleep(0.01)
    assert answered == [-1, *range(50)]


def test_only_so_many_may_wait(loaded: tuple[Any, Any]) -> None:
    worker = Worker("slow", *loaded, batch_size=1, most_waiting=1)
    begun, held = threading.Event(), threading.Event()

    def hold(_: str) -> None:
        begun.set()
        held.wait(30)

    ended: list[bool] = []
    red = prompt_ids(loaded[1], [{"role": "user", "content": "red"}])
    worker.submit(Request(red, 9, hold), ended.append)
    assert begun.wait(30)
    worker.submit(Request([104], 2, lambda _: None), ended.append)
    with pytest.raises(queue.Full):
        worker.submit(Request([104], 2, lambda _: None), ended.append)
    held.set()
    while len(ended) < 2:
        time.sleep(0.01)
    assert ended == [True, True]


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("node7", False),
    ],
)
def test_beyond_this_machine_a_token_is_asked_for(host: str, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve.TOKEN, raising=False)
    if alone:
        assert serve.token_for(host) is None
    else:
        with pytest.raises(UserError, match="there is no token"):
            serve.token_for(host)
    monkeypatch.setenv(serve.TOKEN, "t")
    assert serve.token_for(host) == "t"


def test_a_port_in_use_is_told_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(UserError, match=f"nothing can listen on port {port} of {host}: address already in use"):
                serve.main(ServeOptions(model="no such model", host=host, port=port))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_it_listens_on_addresses_of_either_kind(host: str) -> None:
    if host == "::1" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    (listening,) = serve.listen(host, 0)
    with listening, socket.create_connection(listening.getsockname()[:2]) as client:
        assert client.getpeername()[0] == host
    with pytest.raises(UserError, match=r"--host 192\.0\.2\.1 is no address of this machine"):
        serve.listen("192.0.2.1", 0)


def test_models_are_called_by_as_much_of_their_path_as_tells_them_apart() -> None:
    assert serve.names(["runs/a/02-merge/model"]) == ["02-merge/model"]
    assert serve.names(["runs/a/02-merge/model", "runs/b/02-merge/model"]) == ["a/02-merge/model", "b/02-merge/model"]
    assert serve.names(["gpt2", "owner/gpt2"]) == ["gpt2", "owner/gpt2"]
    with pytest.raises(UserError, match="compared with itself"):
        serve.names(["x/y", "x/y"])
