"""A server over real sockets, with a model that answers and one that cannot."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from fttrain.serving.api import Limits, make_app
from fttrain.serving.worker import Worker
from fttrain.tools import serve
from fttrain.tools.chat import load

LIMITS = Limits(max_new_tokens=16, seconds=60.0)
HOSTS = frozenset(serve.LOOPBACK)


class Broken:
    """A model that cannot answer."""

    def __init__(self, model: Any) -> None:
        self.config, self.device = model.config, model.device

    def generate(self, **_: object) -> None:
        raise RuntimeError("a secret of this machine: /root/weights")


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    return load(str(tiny_model))


@pytest.fixture(scope="module")
def workers(loaded: tuple[Any, Any]) -> dict[str, Worker]:
    model, tokenizer = loaded
    sizes = {"batch_size": 8, "most_waiting": 64}
    return {
        "tiny": Worker("tiny", model, tokenizer, **sizes),
        "broken": Worker("broken", Broken(model), tokenizer, **sizes),
    }


def serving(workers: dict[str, Worker], token: str | None = None) -> Iterator[int]:
    """The port of a server that runs in a thread."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(workers, LIMITS, HOSTS, token), log_level="critical"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def port(workers: dict[str, Worker]) -> Iterator[int]:
    yield from serving(workers)
