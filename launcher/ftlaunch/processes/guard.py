"""A process that outlives the one that drives an attempt, to end the attempt's ranks where that is killed."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ftlaunch import processes

ALL_IS_WELL = b"."


@contextmanager
def ended_with_this(attempt: Path) -> Generator[None]:
    """While this is open, the attempt's processes on this machine are killed as soon as this process is.

    SLURM finds the processes of a job by their parents where a site has no cgroups. It then kills a task and misses its
    ranks, which are sessions of their own: they would train on while a later job trains from the same checkpoint.
    """
    ours, theirs = os.pipe()
    if (guard := os.fork()) == 0:
        _keep_watch(ours, theirs, attempt)
    os.close(ours)
    try:
        yield
    finally:
        os.write(theirs, ALL_IS_WELL)
        os.close(theirs)
        os.waitpid(guard, 0)


def _keep_watch(pipe: int, other_end: int, attempt: Path) -> None:
    """Wait for a word, or for the end of whoever could say it; this process then ends as well."""
    try:
        os.setsid()
        os.close(other_end)
        # srun waits until nobody holds a task's output open.
        for stream in range(3):
            os.close(stream)
        if os.read(pipe, 1) != ALL_IS_WELL:
            processes.end(attempt)
    finally:
        os._exit(0)  # as a copy of its parent it must not run what that would run at its end
