"""Asking runs to stop and ending them, wherever they were started."""

import time

from ftlaunch.backend import backends, runs
from ftlaunch.errors import UserError
from ftlaunch.run.layout import RunDir

POLL_SECONDS = 0.1


def ask_to_stop(run: RunDir, wait: float) -> bool:
    """Ask the stage that runs to save and leave; True once nothing works any more, False where it does after `wait`.

    UserError where nothing runs, or where SLURM could not be told to let go of jobs that wait.
    """
    runs.require_own(run)
    backend = backends.of(run)
    if runs.first_unfinished(run) is None or backend.is_over(run):
        raise UserError(f"{run.path.name} is not running", f"see how it stands: ftlaunch status {run.in_shell}")
    silent = backend.ask_to_stop(run)
    deadline = time.monotonic() + wait
    while not (over := backend.is_over(run)) and (left := deadline - time.monotonic()) > 0:
        # A SLURM controller serves the whole cluster and sets the pace; a local folder may be read at any pace.
        time.sleep(min(backend.patience or POLL_SECONDS, left))
    # Raised only now: the running stage has its stop file even if SLURM is silent, and may have ended meanwhile.
    if silent is not None and not over:
        raise silent
    return over


def cancel(run: RunDir) -> bool:
    """End every process of a run at once; False where there was none. UserError where that cannot be done from here."""
    runs.require_own(run)
    backend = backends.of(run)
    if backend.is_over(run):
        return False
    backend.cancel(run)
    return True
