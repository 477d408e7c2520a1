"""Stopping and ending a run whose stages are SLURM jobs."""

from ftlaunch.cluster import queue
from ftlaunch.run.files import write_atomic
from ftlaunch.run.layout import CANCEL, RunDir


def ask_to_stop(run: RunDir) -> None:
    """Have the stage that runs save and leave; jobs that wait leave the queue."""
    jobs = _alive(run)
    waiting = [job for job, state in jobs.items() if state == "PENDING"]
    if len(waiting) < len(jobs):
        step = next(step for step in run.step_dirs() if not step.result.exists())
        write_atomic(step.stop, "asked")
    queue.cancel(waiting, queue.read_cluster(run))


def cancel(run: RunDir) -> None:
    """End the run's jobs at once, those that wait behind included."""
    for step in run.step_dirs():
        if not step.result.exists():
            write_atomic(step.stop, CANCEL)
    queue.cancel(_alive(run), queue.read_cluster(run))


def _alive(run: RunDir) -> dict[str, str]:
    """SLURM's word for each job of a run that waits or runs."""
    return {entry.id: entry.state for entry in queue.read_queue([run]).values() if entry.alive}
