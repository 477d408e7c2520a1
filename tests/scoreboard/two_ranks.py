"""Trials with two ranks: one dies in a save, one hangs."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tests.scoreboard import tiny
from tests.scoreboard.child import Child
from tests.scoreboard.trial import Verdict

SEEN_WITHIN = 60.0
SETTLE = 5.0
"""Seconds for the other rank to do all that it does while one is at its slow disk."""
MANY = 20_000


class GroupSaver(Protocol):
    """A Saver that also trains as one rank of two, and knows what a resume would take."""

    files_a_save: int
    """Files that rank 1 saves with torch at each checkpoint."""

    def train(self, folder: Path, *, stop_at: int | None = None, steps: int = tiny.STEPS) -> str: ...

    def checkpoints(self, folder: Path) -> list[Path]: ...

    def chosen(self, folder: Path) -> Path: ...


def start(saver: GroupSaver, work: Path, steps: int, **of_rank_1: str) -> list[Child]:
    environments = tiny.ranks(2)
    environments[1].update(of_rank_1)
    return [
        Child(lambda: saver.train(work, steps=steps), work / f"rank{rank}", **environment)
        for rank, environment in enumerate(environments)
    ]


def latest(saver: GroupSaver, work: Path) -> Verdict:
    """Rank 1's disk is slow at its second save; once rank 0 has done its part, both are killed."""
    (work / "run").mkdir()
    ranks = start(saver, work / "run", tiny.STEPS, SLOW_DISK=str(saver.files_a_save))
    wait(lambda: len(saver.checkpoints(work / "run")) == 2 or all(rank.ended() for rank in ranks), 60)
    time.sleep(SETTLE)
    for rank in ranks:
        rank.kill()
    first, *_ = found = saver.checkpoints(work / "run")
    assert len(found) == 2, ranks[0].said()
    chosen = saver.chosen(work / "run")
    lacking = sorted({alike(first, path) for path in first.rglob("*")} - {alike(chosen, p) for p in chosen.rglob("*")})
    if lacking:
        return Verdict("FAIL", f"{chosen.name} is taken and lacks {', '.join(lacking)}")
    return Verdict("pass", f"{chosen.name} is taken, and whole")


def alike(folder: Path, path: Path) -> str:
    return str(path.relative_to(folder))


def hang(saver: GroupSaver, work: Path) -> Verdict:
    (work / "run").mkdir()
    ranks = start(saver, work / "run", MANY)
    beat = work / "run/beat"
    wait(beat.exists, 60)
    assert not any(rank.ended() for rank in ranks), ranks[0].said()
    os.kill(ranks[1].pid, signal.SIGSTOP)
    began = time.monotonic()
    wait(ranks[0].ended, SEEN_WITHIN)
    seen = ranks[0].pid == 0
    for rank in ranks:
        rank.kill()
    return Verdict("pass", f"after {time.monotonic() - began:.0f} s") if seen else Verdict("FAIL", "not noticed")


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
