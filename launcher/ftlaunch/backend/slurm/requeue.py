"""Putting a job back into SLURM's queue from one of its own tasks, also while the controller is being restarted."""

import signal
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from ftlaunch.backend.slurm import queue
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import UserError
from ftlaunch.processes.signals import PreemptionSignals
from ftlaunch.run.layout import RunDir

T = TypeVar("T")

LEAVE_SECONDS = 60.0
"""SLURM may take so long to end the tasks of a job that was requeued."""
PATIENCE_SECONDS, ASK_AGAIN_SECONDS = 60.0, 3.0
"""What SLURM refuses is asked for so long; where it does not answer at all, as long as the job lives."""


def job_state(run: RunDir, job: str) -> str:
    """SLURM's word for a job. UserError where that cannot be told, though the controller answers."""
    # Not squeue, which may be a site's own whose answers are kept for a minute.
    cluster = queue.read_cluster(run)
    entry = _patiently(lambda: queue.show(job, cluster))
    if entry is None or not queue.belongs(entry, run):  # a controller that has lost its state begins to count again
        raise UserError(f"SLURM does not know this job, {job}, any more", "go on with `ftlaunch resume`")
    return entry.state


def requeue(job: str, lost: list[str], cluster: Cluster) -> None:
    """Put this job back into the queue, without the nodes that are lost. SLURM then ends its tasks, this one too.

    UserError where it cannot be done.
    """
    steps = [["scontrol", "requeue", job]]
    if lost:
        # After the requeue: SLURM changes ExcNodeList of pending jobs only.
        steps.append(["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join([*cluster.exclude, *lost])}"])
    for command in steps:
        _patiently(partial(_control, command, cluster))
    for number in PreemptionSignals.NUMBERS:
        # So far these signals only set a flag; now SLURM's SIGTERM is to end this task.
        signal.signal(number, signal.SIG_DFL)
    time.sleep(LEAVE_SECONDS)


def _control(command: list[str], cluster: Cluster) -> None:
    done = queue.call(command, cluster)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip()}", "go on with `ftlaunch resume`")


def _patiently(ask: Callable[[], T]) -> T:
    """The answer of a controller that may be away for a while. UserError where it is there and goes on refusing."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return ask()
        except UserError as error:
            is_away = queue.AWAY.search(error.message)
            if not is_away and time.monotonic() > deadline:
                raise
            time.sleep(ASK_AGAIN_SECONDS)
