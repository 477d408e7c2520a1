"""Stopping and ending a run whose stages are SLURM jobs."""

from collections.abc import Callable

from ftlaunch.backend.slurm import queue
from ftlaunch.backend.slurm.queue import Entry
from ftlaunch.errors import UserError
from ftlaunch.run.files import write_atomic
from ftlaunch.run.layout import CANCEL, STOP, RunDir, StageDir


def ask_to_stop(run: RunDir) -> str | None:
    """Have the stage that runs save and leave; jobs that wait leave the queue.

    Says why where the queue cannot be reached: then they leave as soon as they start. UserError where the stage that
    runs cannot be told.
    """
    # Before the queue is asked: a job that starts in between finds the file and leaves.
    unwritten = _write(run.unfinished()[:1], STOP)
    # As squeue's answer may be old: a job that has started meanwhile is to save.
    silent = _end(run, lambda entry: entry.state in queue.WAITING, "--state=PENDING")
    if unwritten:
        raise UserError(unwritten, "make room, or mend the disk; `ftlaunch cancel` ends the run without saving")
    return silent


def cancel(run: RunDir) -> str | None:
    """End the run's jobs at once, those that wait for them included. Says why where the queue cannot be reached.

    UserError where the tasks cannot be told either.
    """
    unwritten = _write(run.unfinished(), CANCEL)
    silent = _end(run, lambda entry: entry.alive)
    if silent and unwritten:
        raise UserError(f"{unwritten}; and {silent}", "try again when SLURM answers")
    return silent


def _write(stage_dirs: list[StageDir], wish: str) -> str | None:
    """Leave a wish in stages. Says why where that cannot be done, which keeps nobody from asking SLURM."""
    for stage_dir in stage_dirs:
        try:
            write_atomic(stage_dir.stop, wish)
        except OSError as error:
            return f"{stage_dir.stop} cannot be written: {error.strerror}"
    return None


def _end(run: RunDir, wanted: Callable[[Entry], bool], *options: str) -> str | None:
    try:
        jobs = [entry.id for entry in queue.read_queue(run).values() if wanted(entry)]
        queue.cancel(jobs, queue.read_cluster(run), *options)
    except UserError as error:
        return error.message
    return None
