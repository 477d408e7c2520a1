"""Stopping and ending a run whose stages are SLURM jobs."""

from collections.abc import Callable

from ftlaunch.backend.slurm import queue
from ftlaunch.backend.slurm.queue import Entry
from ftlaunch.errors import UserError
from ftlaunch.run.files import write_atomic
from ftlaunch.run.layout import CANCEL, STOP, RunDir


def ask_to_stop(run: RunDir) -> str | None:
    """Have the stage that runs save and leave; jobs that wait leave the queue.

    Says why where the queue cannot be reached: then they leave as soon as they start.
    """
    step = next(stage_dir for stage_dir in run.stage_dirs() if not stage_dir.result.exists())
    # Before the queue is asked: a job that starts in between finds the file and leaves.
    write_atomic(step.stop, STOP)
    return _end(run, lambda entry: entry.state == "PENDING")


def cancel(run: RunDir) -> str | None:
    """End the run's jobs at once, those that wait for them included. Says why where the queue cannot be reached."""
    for stage_dir in run.stage_dirs():
        if not stage_dir.result.exists():
            write_atomic(stage_dir.stop, CANCEL)
    return _end(run, lambda entry: entry.alive)


def _end(run: RunDir, wanted: Callable[[Entry], bool]) -> str | None:
    try:
        jobs = [entry.id for entry in queue.read_queue(run).values() if wanted(entry)]
        queue.cancel(jobs, queue.read_cluster(run))
    except UserError as error:
        return error.message
    return None
