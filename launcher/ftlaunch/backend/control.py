"""Starting, stopping and ending the driver of a written run, from this process or another."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time

from ftlaunch import processes
from ftlaunch.backend.display import Display, open_display
from ftlaunch.backend.local import driver as local_driver
from ftlaunch.backend.slurm import control
from ftlaunch.errors import DONE, UserError
from ftlaunch.processes import Identity, lock
from ftlaunch.processes.signals import StopSignals
from ftlaunch.run import outputs
from ftlaunch.run.layout import RunDir, StageDir
from ftlaunch.safety import trust
from ftlaunch.watch.status import is_over

CANCEL_SECONDS = 5.0
POLL_SECONDS = 0.1
QUEUE_SECONDS = 2.0
"""Between two questions to a SLURM controller, which others need too."""


def drive_here(run: RunDir, held: int | None = None, interrupts: StopSignals | None = None) -> int:
    """Drive a run in this process and return the exit code; `held` is its lock where this process was born with it.

    `interrupts` is the caller's where it listens to signals already. UserError where the run cannot be taken over.
    """
    held = _take_over(run) if held is None else held
    try:
        code = _drive(run, display := open_display(), interrupts)
    finally:
        lock.release(held)
    if code == DONE and (told := outputs.describe(run)):
        display.say(told)
    return code


def _drive(run: RunDir, display: Display, interrupts: StopSignals | None) -> int:
    if not run.held.exists():
        return local_driver.drive(run, display, interrupts)
    from ftlaunch.backend.slurm import held  # it needs submitit, which takes its time to load

    return held.drive(run, display, interrupts)


def _take_over(run: RunDir) -> int:
    """The lock of a run, with nothing left of what the last driver was asked.

    UserError where another process drives it, where processes of a driver that is gone still work in it, and where
    others may have written in it: its plan says what is run, its checkpoints what is loaded.
    """
    trust.require(run.path, deep=True)
    held = lock.take(run)
    if leftovers := processes.of_attempts(run.path):
        lock.release(held)
        raise UserError(
            f"{run.path.name} still has {len(leftovers)} processes, though nothing drives them",
            f"end them with `ftlaunch cancel {run.path}`",
        )
    for stage_dir in run.stage_dirs():
        stage_dir.stop.unlink(missing_ok=True)
    return held


def drive_detached(run: RunDir) -> None:
    """Start a driver that outlives this process and its terminal. UserError where the run cannot be taken over.

    The lock passes from this process to that one without ever being free.
    """
    held = _take_over(run)
    command = [sys.executable, "-P", "-m", "ftlaunch", "drive", str(run.path), "--lock", str(held)]
    with run.driver_log.open("ab") as log:
        driver = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=[held]
        )
    lock.name_holder(held, driver.pid)
    os.close(held)


def ask_to_stop(run: RunDir, wait: float) -> bool:
    """Ask the stage that runs to save and leave; True once nothing works any more, False where it does after `wait`.

    UserError where nothing runs, or where SLURM could not be told to let go of jobs that wait.
    """
    step = _unfinished(run)
    if step is None or is_over(run):
        raise UserError(f"{run.path.name} is not running", f"see how it stands: ftlaunch status {_quoted(run)}")
    silent = control.ask_to_stop(run) if run.cluster.exists() else step.stop.touch()
    deadline = time.monotonic() + wait
    while not (over := is_over(run)) and time.monotonic() < deadline:
        time.sleep(QUEUE_SECONDS if run.cluster.exists() else POLL_SECONDS)
    if silent is not None and not over:
        raise UserError(f"{run.path.name} saves and leaves if it runs, but {silent}", _WHERE_IT_WAITS)
    return over


_WHERE_IT_WAITS = "jobs that wait leave as soon as they start; call this again when SLURM answers to have them go now"


def _quoted(run: RunDir) -> str:
    return shlex.quote(str(run.path))


def _unfinished(run: RunDir) -> StageDir | None:
    return next((stage_dir for stage_dir in run.stage_dirs() if not stage_dir.result.exists()), None)


def cancel(run: RunDir) -> bool:
    """End every process of a run at once, its driver included; False where there was none.

    UserError where its driver is on another host, a process cannot be ended, or SLURM could not be told.
    """
    if is_over(run):
        return False
    if run.cluster.exists():
        if silent := control.cancel(run):
            raise UserError(f"{run.path.name} is ended where it runs, but {silent}", _WHERE_IT_WAITS)
        return True
    if driver := lock.holder(run):
        _end_driver(driver)
    if stuck := processes.end(run.path):
        raise UserError(f"processes {stuck} cannot be ended", "they hang in the kernel: the machine may need a restart")
    return True


def _end_driver(driver: Identity) -> None:
    """Have the driver kill and leave (SIGQUIT), so that a terminal is left in order; kill it where it does not."""
    if processes.is_alive(driver) is None:
        raise UserError(f"it is driven on {driver.host}", "cancel it there")
    for how in (signal.SIGQUIT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(driver.pid, how)
        deadline = time.monotonic() + CANCEL_SECONDS
        while processes.is_alive(driver) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
