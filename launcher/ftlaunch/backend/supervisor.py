"""One attempt at a stage on this machine: its processes are started, watched and all ended."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ftlaunch import processes
from ftlaunch.backend.node_folder import node_folder
from ftlaunch.errors import UserError
from ftlaunch.plan.plan import PlannedStage
from ftlaunch.processes import memory, outcome
from ftlaunch.processes.environment import inherited
from ftlaunch.processes.outcome import Failure, Outcome
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import NODE_FOLDER, Attempt, StageDir
from ftlaunch.safety.redact import redact_file

POLL_SECONDS = 0.1
FIRST_LOOKS_SECONDS = 1.0
"""Between two looks of an attempt's first node at files that several nodes share."""
OTHERS_LOOK_SECONDS = 5.0
LEAVE_SECONDS = 3.0
"""What is left of an attempt may take so long to go once its launching process has ended."""
PEER_SECONDS = 15.0
"""Ranks may take so long to leave once one of them has failed; they could wait half an hour for the dead one."""
IDLE_SECONDS, IDLE_WORK = 3.0, 15
"""Ranks that do next to nothing for so long by then wait for the dead one, and would only be ended later."""
TELL_SECONDS = 10.0
"""The launching process may take so long to tell, once no rank is left."""

Order = Literal["go on", "kill"]


def environment(planned: PlannedStage) -> dict[str, str]:
    """The environment of a stage's processes. UserError where the program that starts them is not installed."""
    variables = inherited() | planned.env
    # The trainer belongs to the interpreter that drives it, also where its virtual environment is not activated.
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables.get('PATH', os.defpath)}"
    # A save must fit in here when someone else ends the launching process; peers of a dead rank are given less.
    variables.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
    if shutil.which(planned.command[0], path=variables["PATH"]) is None:
        raise UserError(f"{planned.command[0]} is not installed", "pip install 'ftlaunch[train]'")
    return variables


@dataclass(frozen=True)
class ExitInfo:
    """How the processes of an attempt ended on this machine."""

    exit_code: int
    """Exit code of the launching process."""
    killed: bool
    """Whether `poll` had them killed."""
    forced: bool
    """Whether ranks were killed that did not leave after a failure."""


def run_attempt(
    planned: PlannedStage, stage_dir: StageDir, attempt: Attempt, variables: dict[str, str], poll: Callable[[], Order]
) -> Outcome | None:
    """Start the processes and return how the attempt ended; None where `poll`, called all along, had them killed."""
    ended = supervise(planned, stage_dir, attempt, variables, poll)
    said = outcome.read_outcome(stage_dir, attempt)
    # What the attempt left counts more than the kill: a hang is written to error.json before its ranks are killed,
    # and a stage may finish just before that.
    if said is None and ended.killed:
        return None
    found = said or outcome.tell_death(attempt, ended.exit_code)
    if isinstance(found, Failure):
        found = outcome.name_cause(found, attempt)
        write_json(attempt.error, found)  # where `status` and `logs` look for it
    return found


def supervise(
    planned: PlannedStage,
    stage_dir: StageDir,
    attempt: Attempt,
    variables: dict[str, str],
    poll: Callable[[], Order],
    ignored_signals: Collection[signal.Signals] = (),
) -> ExitInfo:
    """Start the processes of one node and wait for their end; they ignore `ignored_signals` until they say otherwise.

    Those signals come to every process of a SLURM job, also to launching ones that would die of them.
    """
    with node_folder() as attempt.local:
        process = _start(planned, stage_dir, attempt, variables | {NODE_FOLDER: str(attempt.local)}, ignored_signals)
        failure, short_of_memory = FailureWatch(process.pid, attempt), memory.kills()
        try:
            write_json(attempt.process, processes.identify(process.pid))
            now = time.time()
            os.utime(attempt.process, (now, now))  # by this node's clock, which metrics go by, and not a file server's
            killed = _watch(process, failure, Looks(planned.spec.parallel.nodes, attempt.node), poll)
        finally:
            _kill_remaining(process, attempt)
    if memory.kills() > short_of_memory:
        with attempt.launch_log.open("a") as file:
            file.write(outcome.OUT_OF_MEMORY)
    for log in _logs_of_this_machine(planned, attempt):
        redact_file(log)  # ranks redact what Python prints; what C++ and the launching process said comes as it is
    return ExitInfo(process.returncode, killed, failure.forced)


def _logs_of_this_machine(planned: PlannedStage, attempt: Attempt) -> list[Path]:
    parallel = planned.spec.parallel
    mine = parallel.ranks_of(attempt.node)
    ranks = [log for rank, log in attempt.rank_logs().items() if parallel.nodes == 1 or rank in mine]
    return [attempt.launch_log, *ranks]


def _start(
    planned: PlannedStage,
    stage_dir: StageDir,
    attempt: Attempt,
    variables: dict[str, str],
    ignored_signals: Collection[signal.Signals],
) -> subprocess.Popen[bytes]:
    def ignore() -> None:
        for number in ignored_signals:
            signal.signal(number, signal.SIG_IGN)

    with attempt.launch_log.open("wb") as log:
        return subprocess.Popen(
            planned.command,
            cwd=stage_dir.path.parent,
            env=variables | {processes.ATTEMPT: str(attempt.path.resolve())},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the terminal is the driver's to answer
            # An ignored signal stays ignored through exec(); a handler would be reset to the default action.
            preexec_fn=ignore if ignored_signals else None,
        )


class Looks:
    """When a node looks at files that all nodes of an attempt share: the more nodes, the less often each of them."""

    def __init__(self, nodes: int, node: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = POLL_SECONDS if nodes == 1 else FIRST_LOOKS_SECONDS if node == 0 else OTHERS_LOOK_SECONDS
        self._clock = clock
        self._next = self._last = 0.0

    def are_due(self, *, soon: bool = False) -> bool:
        """Whether it is time to look again; if so, the next time is later. `soon`: something has happened."""
        now = self._clock()
        if now < (min(self._next, self._last + FIRST_LOOKS_SECONDS) if soon else self._next):
            return False
        self._last = now
        self._next = now + self._seconds
        return True


def _watch(process: subprocess.Popen[bytes], failure: "FailureWatch", looks: Looks, poll: Callable[[], Order]) -> bool:
    """Wait for the launching process, ending ranks that outlive a failure; True where `poll` gave up on it."""
    while process.poll() is None:
        if looks.are_due(soon=failure.is_noticed) and (said := look(failure, poll)) != "go on":
            return said == "kill"
        time.sleep(POLL_SECONDS)
    return False


def look(failure: "FailureWatch", poll: Callable[[], Order]) -> Literal["go on", "kill", "leave"]:
    """Whether the launching process is to go on, is to be killed, or has nothing left to wait for."""
    if not failure.attempt.path.is_dir():
        message = f"{failure.attempt.path.parent.parent} is gone, and its processes have been ended"
        raise UserError(message, "a run cannot go on without its folder: start it again, and leave the folder alone")
    return "leave" if failure.end_stragglers() else poll()


class FailureWatch:
    """Ends the peers of a failed rank when they do not leave, so that the launching process can tell what happened."""

    def __init__(self, launcher: int, attempt: Attempt) -> None:
        self._launcher = launcher
        self.attempt = attempt
        self._since: float | None = None
        self._log_size = 0
        self._at_work: tuple[float, int] | None = None
        """When ranks were last seen at work here, and how much they had done by then."""
        self.forced = False

    @property
    def is_noticed(self) -> bool:
        """Whether a rank has failed, so that shared files are looked at often for a while."""
        return self._since is not None

    def end_stragglers(self) -> bool:
        """Whether even the launching process stays on, though no rank is left."""
        if self._since is None:
            self._since = time.monotonic() if self._has_failed() else None
            return False
        waited = time.monotonic() - self._since
        if not self.forced and (waited > PEER_SECONDS or self._are_idle()):
            self.forced, self._since = True, time.monotonic()
        if self.forced:
            # At every look, as ranks may start children. The launching process is spared: it prints which rank died.
            processes.end(self.attempt.path, spare=self._launcher)
        return self.forced and time.monotonic() - self._since > TELL_SECONDS

    def _are_idle(self) -> bool:
        """Whether no rank here has computed, read or written anything lately, nor waits for a disk."""
        done = processes.work_of(processes.of_attempts(self.attempt.path, spare=self._launcher))
        # abs(): a rank that exits takes its share of the sum along, and that is a sign of life, too.
        if self._at_work is None or done is None or abs(done - self._at_work[1]) > IDLE_WORK:
            self._at_work = time.monotonic(), done or 0
        return time.monotonic() - self._at_work[0] > IDLE_SECONDS

    def _has_failed(self) -> bool:
        if self.attempt.error.exists():
            return True
        before, self._log_size = self._log_size, self.attempt.launch_log.stat().st_size
        # This is called at every look; the log is only read again after it has grown.
        return self._log_size != before and outcome.peers_are_being_ended(self.attempt)


def _kill_remaining(process: subprocess.Popen[bytes], attempt: Attempt) -> None:
    """End every process of the attempt, in whatever session; they have a moment to go if the launching one has gone."""
    processes.end(attempt.path, grace=LEAVE_SECONDS if process.poll() is not None else 0.0)
    process.kill()  # it may not have come as far as its environment
    process.wait()
