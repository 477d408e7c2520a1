"""Runs that a process on this machine drives, stage by stage: started, asked to stop and ended from any other."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from ftlaunch import processes
from ftlaunch.backend import runs
from ftlaunch.backend.display import Display, open_display
from ftlaunch.backend.protocol import Backend, Say
from ftlaunch.backend.status import RunStatus, StageStatus, State, measured, run_status
from ftlaunch.cluster import NAME_ONE
from ftlaunch.errors import BAD_INPUT, DONE, STAGE_FAILED, UserError
from ftlaunch.plan.plan import Plan, PlannedStage
from ftlaunch.processes import Identity, lock
from ftlaunch.processes.environment import require_trainer
from ftlaunch.processes.outcome import Done, Failure, Outcome, Stopped, describe_failure, read_outcome
from ftlaunch.processes.signals import StopSignals
from ftlaunch.recipe.stages import Ppo
from ftlaunch.run import outputs
from ftlaunch.run.files import read_json, require_cache
from ftlaunch.run.layout import Attempt, RunDir, StageDir
from ftlaunch.safety import trust

CANCEL_SECONDS = 10.0
"""A driver may take so long to kill its processes, on a busy machine as well."""
POLL_SECONDS = 0.1
_DRIVEN: dict[bool | None, State] = {True: "running", False: "waiting", None: "unknown"}


class Driven(Backend):
    """A backend whose runs are driven by a process here, which holds the run's lock while it does so."""

    @abstractmethod
    def drive_stages(self, run: RunDir, display: Display, interrupts: StopSignals | None) -> int:
        """Run the unfinished stages and return the exit code. The caller holds the run's lock."""

    @abstractmethod
    def require_nodes(self, plan: Plan) -> None:
        """UserError where a plan asks for more nodes than there are."""

    def choose_nodes(self, run: RunDir) -> None:
        """Note where a run goes on, if it may be elsewhere than on this machine."""

    def require(self, plan: Plan, after: str | None) -> None:
        """UserError where a plan cannot be started here."""
        self.require_nodes(plan)
        require_trainer()
        # PPO and streams keep no tokens.
        tables = [planned.spec.data for planned in plan.stages if not isinstance(planned.spec.stage, Ppo)]
        if any(not data.streaming for table in tables for data in table.values()):
            require_cache()
        if after is not None:
            raise UserError("--after is for jobs of a cluster", NAME_ONE)

    def start(self, run: RunDir, *, detach: bool, after: str | None, fresh: bool) -> int | None:  # noqa: ARG002
        """Drive a run from here and return the exit code, or have a driver in the background do it and return None."""
        self.require(runs.read_plan(run), after)
        self.choose_nodes(run)
        if not detach:
            return self.drive(run)
        drive_detached(run)
        print(f"{run.path.name} runs in the background. Come back with", file=sys.stderr)
        print(come_back(run))
        return None

    def drive(self, run: RunDir, held: int | None = None, interrupts: StopSignals | None = None) -> int:
        """Drive a run in this process and return the exit code; `held` is its lock where this process was born with it.

        `interrupts` is the caller's where it listens to signals already. UserError where the run cannot be taken over.
        """
        held = _take_over(run) if held is None else held
        try:
            code = self.drive_stages(run, display := open_display(), interrupts)
        finally:
            lock.release(held)
        if code == DONE and (told := outputs.describe(run)):
            display.say(told)
        return code

    def conduct(self, runs: Mapping[str, RunDir], at_once: int | None, say: Say) -> int:  # noqa: ARG002
        """Drive runs that have not finished, one after another; the exit code.

        A mistake of the user's or a signal ends them all, a failing run only itself.
        """
        code = DONE
        # One listener for all runs: a Ctrl-C that comes between two of them is not lost.
        with StopSignals() as interrupts:
            for number, (name, run) in enumerate(runs.items(), start=1):
                told = f"trial {number} of {len(runs)}: {name}"
                if not run.unfinished():
                    say(f"{told}: finished")
                    continue
                if interrupts.wish != "go on":
                    return interrupts.exit_code
                say(told)
                ended = self.drive(run, interrupts=interrupts)
                if ended not in (DONE, STAGE_FAILED):
                    return ended
                code = max(code, ended)
        return code

    def states(self, runs: Sequence[RunDir]) -> list[RunStatus]:
        """How runs stand, in their order."""
        return [self.state(run) for run in runs]

    def state(self, run: RunDir) -> RunStatus:
        """How a run and its stages stand now, by its folder and the process table of this machine."""
        driver = lock.holder(run)
        found = run_status(run, [_stage_status(stage_dir, driver) for stage_dir in run.stage_dirs()])
        if found.state == "waiting" and driver:  # between two stages, or about to start the first
            return msgspec.structs.replace(found, state=_DRIVEN[processes.is_alive(driver)])
        return found

    def is_over(self, run: RunDir) -> bool:
        """Whether nothing of a run works any more. False where its driver cannot be seen from here, nor signed off."""
        driver = lock.holder(run)
        # is_alive returns None for a driver on another host: that run may be at work. Even if a driver of this machine
        # is dead, ranks may outlive it, so they are looked for as well.
        return (driver is None or processes.is_alive(driver) is False) and not processes.of_attempts(run.path)

    def ask_to_stop(self, run: RunDir) -> None:
        """Have the stage that runs save and leave; its driver then starts no other."""
        for stage_dir in run.unfinished()[:1]:
            stage_dir.stop.touch()

    def cancel(self, run: RunDir) -> None:
        """End every process of a run at once, its driver included.

        UserError where its driver is on another host, or where a process cannot be ended.
        """
        # The driver goes first: while it lives, it takes the death of its ranks for a failure and writes error.json.
        if driver := lock.holder(run):
            _end_driver(run, driver)
        if stuck := processes.end(run.path):
            raise UserError(
                f"processes {stuck} cannot be ended", "they hang in the kernel: the machine may need a restart"
            )


@dataclass(frozen=True)
class StageDriver(ABC):
    """Sees the stages of a run from their start to their end, and says how each ended."""

    run: RunDir
    display: Display
    interrupts: StopSignals

    @abstractmethod
    def run_stage(self, planned: PlannedStage) -> int:
        """See one stage from its start to its end; the exit code says which end."""

    def run_unfinished(self, plan: Plan) -> int:
        """Run the stages that have no result, one after another, up to the first that gives none."""
        for planned in runs.unfinished(self.run, plan):
            if (code := self.run_stage(planned)) != DONE:
                return code
        return DONE

    def report(self, stage_dir: StageDir, outcome: Outcome, took: str) -> int:
        """Say how a stage ended, and return the exit code for it."""
        match outcome:
            case Done():
                self.display.say(f"{stage_dir.name}  done in {took}")
                return DONE
            case Stopped():
                return self.stopped(stage_dir, f"saved and stopped after {took}")
            case failure:
                self.display.say(f"{stage_dir.name}  failed after {took}\n{describe_failure(failure)}")
                if not failure.user_error:
                    self.display.say(f"  in full: ftlaunch logs {self.run.in_shell} --first-error")
                return BAD_INPUT if failure.user_error else STAGE_FAILED

    def stopped(self, stage_dir: StageDir, how: str) -> int:
        """Say why a stage is left unfinished, and return the exit code for it."""
        self.display.say(f"{stage_dir.name}  {how}\n  → go on with `ftlaunch resume {self.run.in_shell}`")
        return self.interrupts.exit_code


def _stage_status(stage_dir: StageDir, driver: Identity | None) -> StageStatus:
    attempts = stage_dir.all_attempts()
    return measured(stage_dir, len(attempts), *_state(stage_dir, attempts, driver))


def _state(stage_dir: StageDir, attempts: list[Attempt], driver: Identity | None) -> tuple[State, str | None]:
    """Return the state in which the newest attempt left a stage, and a remark on it."""
    if not attempts:
        return ("done" if stage_dir.result.exists() else "waiting"), None
    newest = attempts[-1]
    involved = [who for who in (driver, read_json(newest.process, Identity)) if who]
    # Looked up first: an attempt may end, and say how, right after it was found alive.
    alive = {processes.is_alive(who): who.host for who in involved}
    match read_outcome(stage_dir, newest):
        case Done():
            return "done", None
        case Stopped():
            return "stopped", None
        case Failure() as failure:
            return "failed", failure.first_line
        case None if True in alive:
            return "running", None
        case None if None in alive:
            return "unknown", f"started on {alive[None]}"
        case None:
            return "interrupted", None


def come_back(run: RunDir) -> str:
    """The commands by which a user sees to a run that goes on by itself, one a line."""
    where = run.in_shell
    return f"  ftlaunch status {where}\n  ftlaunch logs -f {where}\n  ftlaunch stop {where}"


def _take_over(run: RunDir) -> int:
    """The lock of a run, with nothing left of what the last driver was asked.

    UserError where another process drives it, where processes of a driver that is gone still work in it, and where
    others may have written in it: its plan says what is run, its checkpoints what is loaded.
    """
    trust.require(run.path, deep=True)
    held = lock.take(run)
    # Ranks survive a driver killed by SIGKILL. A second set would write the same metrics and checkpoints.
    if leftovers := processes.of_attempts(run.path):
        lock.release(held)
        raise UserError(
            f"{run.path.name} still has {len(leftovers)} processes, though nothing drives them",
            f"end them with `ftlaunch cancel {run.in_shell}`",
        )
    for stage_dir in run.stage_dirs():
        # The request that ended the last driver would otherwise stop this one at its first optimizer step.
        stage_dir.stop.unlink(missing_ok=True)
    return held


def drive_detached(run: RunDir) -> None:
    """Start a driver that outlives this process and its terminal. UserError where the run cannot be taken over.

    The lock passes from this process to that one without ever being free.
    """
    held = _take_over(run)
    # -P keeps the working directory off sys.path, where a file such as typing.py would shadow the real module.
    command = [sys.executable, "-P", "-m", "ftlaunch", "drive", str(run.path), "--lock", str(held)]
    with run.driver_log.open("ab") as log:
        driver = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=[held]
        )
    # flock belongs to the open file, which the driver has inherited: closing our descriptor does not release it.
    lock.name_holder(held, driver.pid)
    os.close(held)


def _end_driver(run: RunDir, driver: Identity) -> None:
    """Have the driver kill and leave (SIGQUIT), so that a terminal is left in order; kill it where it does not."""
    if processes.is_alive(driver) is None:
        raise UserError(f"it is driven on {driver.host}", "cancel it there")
    for how in (signal.SIGQUIT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(driver.pid, how)
        deadline = time.monotonic() + CANCEL_SECONDS
        # One that has signed off drives no more, and may take its time to write the report.
        while lock.holder(run) == driver and processes.is_alive(driver) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if lock.holder(run) != driver:
            return
