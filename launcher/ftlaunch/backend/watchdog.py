"""Noticing that the ranks of an attempt have stopped taking steps, and telling what each of them was at."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from msgspec import Struct

from ftlaunch import processes
from ftlaunch.processes.outcome import Failure
from ftlaunch.run.layout import Attempt, StageDir
from ftlaunch.run.progress import MetricsTail, read_preparing

PATIENCE = 4.0
"""Times the longest pause between two steps so far, an evaluation or a save included, that a step may take."""
START_SECONDS = 300.0
"""A start may take at least so long before its first step: on a busy machine, imports alone take minutes."""
STOPPED_SECONDS = 20.0
"""A step may take so long while a rank is stopped, and others wait for it."""
CHECK_SECONDS = 2.0
STACK_SECONDS = 3.0
"""A rank may take so long to write where it is."""
STATES = {"T": "stopped by a signal", "D": "stuck in the kernel", "Z": "dead", "R": "computing", "S": "waiting"}


class RankState(Struct, frozen=True, kw_only=True):
    """What a rank was at when its attempt was found to hang."""

    rank: int
    node: str
    state: str
    """The kernel's letter for its process."""
    silent: float | None
    """Seconds since it last began a step; None where it never did."""


class HangWatch:
    """Asked all along whether an attempt hangs: a step may take `floor` seconds, or longer if others did.

    `holds_up` tells whether a rank of this machine is stopped while others wait, for which there is less patience.
    """

    def __init__(self, stage_dir: StageDir, floor: float, holds_up: Callable[[], bool] = lambda: False) -> None:
        self.floor = floor
        self._holds_up = holds_up
        self._preparing = stage_dir.preparing
        # All attempts of a stage share metrics.jsonl, and steps of earlier ones do not tell the pace of this one.
        self._metrics = MetricsTail(stage_dir.metrics, since=time.time())
        self._newest: float | None = None
        """When the newest step was taken."""
        self._rows: int | None = None
        """Tokenized when it was last looked at."""
        self._pause: float | None = None
        """The longest time between two steps so far."""
        self._silent = 0.0
        self._checked = time.monotonic()

    def poll(self) -> float | None:
        """Look for new steps; return the seconds without one where they are too many, None where all is well."""
        passed = time.monotonic() - self._checked
        if passed < CHECK_SECONDS:
            return None
        self._checked = time.monotonic()
        # Where more has passed it was this process, or the whole machine, that stood still.
        self._silent += min(passed, 2 * CHECK_SECONDS)
        for time_of_step in [entry["time"] for entry in self._metrics.read() if "time" in entry]:
            if self._newest is not None:
                self._pause = max(self._pause or 0.0, time_of_step - self._newest)
            self._newest = time_of_step
            self._silent = 0.0
        if self._newest is None and self._poll_rows():
            self._silent = 0.0
        if self._silent > STOPPED_SECONDS and self._holds_up():
            return self._silent
        return self._silent if self._silent > self._allowed() else None

    def _poll_rows(self) -> bool:
        """Look for rows, whether more were tokenized since the last look: a start may take hours of that."""
        before, preparing = self._rows, read_preparing(self._preparing)
        self._rows = preparing.rows if preparing else None
        return self._rows is not None and self._rows != before

    def _allowed(self) -> float:
        if self._pause is None:
            return max(START_SECONDS, 3 * self.floor)  # the model is loaded
        return max(self.floor, PATIENCE * self._pause)


def one_holds_up_others(attempt: Attempt, ranks: range) -> bool:
    """Whether some ranks on this machine are stopped by a signal, and some are not."""
    states = [processes.state(pid) == "T" for pid in processes.ranks_of(attempt.path, ranks).values()]
    # If all of them are stopped, somebody has paused the run, and no rank waits for another.
    return any(states) and not all(states)


def interrogate(attempt: Attempt, node: str, ranks: range) -> list[RankState]:
    """The state of each rank on this machine, after it was asked to write its Python stacks into its log."""
    found = [_state(attempt, node, rank, pid) for rank, pid in processes.ranks_of(attempt.path, ranks).items()]
    # After the states were read: the signal wakes a waiting rank, which would then look busy.
    for pid in processes.ranks_of(attempt.path, ranks).values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGQUIT)
    time.sleep(STACK_SECONDS)
    return found


def _state(attempt: Attempt, node: str, rank: int, pid: int) -> RankState:
    beat = attempt.beat(rank)
    silent = time.time() - beat.stat().st_mtime if beat.exists() else None
    return RankState(rank=rank, node=node, state=processes.state(pid), silent=silent)


def failure(attempt: Attempt, silent: float, ranks: list[RankState]) -> Failure:
    """What is known of a hang: the rank that holds up the others, as far as it can be told."""
    # To blame, in this order: a rank that is stopped, stuck or dead; one that never began a step; the one silent
    # longest. The others wait for it in a collective.
    slowest = max(ranks, key=lambda one: (one.state in "TDZ", one.silent is None, one.silent or 0.0), default=None)
    message = f"no step for {silent:.0f} s"
    if slowest is not None:
        message += f"; rank {slowest.rank} on {slowest.node} is {STATES.get(slowest.state, slowest.state)}"
    return Failure(
        rank=slowest.rank if slowest else None,
        type="Hang",
        message=message,
        remedy="where each rank was is at the end of its log: ftlaunch logs RUN --rank K",
        log=str(attempt.rank_log(slowest.rank if slowest else 0)),
    )
