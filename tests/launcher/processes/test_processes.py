"""Which process of an attempt is which rank."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ftlaunch import processes

Start = Callable[..., int]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a process of an attempt in `tmp_path`, and return its number: `start(RANK="1")`."""
    started: list[subprocess.Popen[bytes]] = []

    def call(**variables: str) -> int:
        time.sleep(0.02)  # two ticks of the clock that tells them apart
        env = os.environ | {processes.ATTEMPT: str(tmp_path.resolve()), **variables}
        started.append(subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], env=env))
        return started[-1].pid

    yield call
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_rank_is_the_oldest_of_its_number_also_where_numbers_began_anew(
    wrapped: bool, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child of a rank, which inherits its variables, may then have a lower process number."""
    start()
    first, other, child = start(RANK="0"), start(RANK="1"), start(RANK="0")
    if wrapped:
        monkeypatch.setattr(processes, "of_attempts", lambda _: [child, first, other])
    assert processes.ranks_of(tmp_path, range(2)) == {0: first, 1: other}
    assert processes.ranks_of(tmp_path, range(1, 2)) == {1: other}


def test_a_lone_rank_is_what_was_launched_and_not_its_own_child(start: Start, tmp_path: Path) -> None:
    launcher = start()
    assert processes.ranks_of(tmp_path, range(1)) == {0: launcher}
    rank = start()
    start()
    assert processes.ranks_of(tmp_path, range(1)) == {0: rank}
