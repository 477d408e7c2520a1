"""Whether a job that has started is one that its run knows of: a submission that was cut short may leave others."""

import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

from ftlaunch.backend.slurm import paths, queue
from ftlaunch.run.layout import RunDir, StageDir

RECORD_SECONDS = 20.0
"""A record may take so long to be seen on a node, whose file system may remember how things were."""
SUBMISSION_SECONDS = 60.0
"""A submission that goes on hands over one more job, or touches its record, at least so often."""
SIGN_SECONDS = 15.0
"""Between two touches."""
POLL_SECONDS = 0.5


def is_on_record(stage_dir: StageDir, job: str, is_over: Callable[[], bool] = lambda: False) -> bool:
    """Whether the run's newest submission is complete and holds a job of this stage; `is_over` ends the waiting."""
    run = stage_dir.run
    seen, since = _signs_of(run), time.monotonic()
    while not is_over():
        submission = queue.read_submission(run)
        record = queue.read_job(stage_dir)
        listed = record is not None and job in record.ids
        if listed and submission is not None and submission.complete:
            return True
        # The submission is at work, so the wait begins again.
        if (now := _signs_of(run)) != seen:
            seen, since = now, time.monotonic()
        going_on = submission is not None and not submission.complete
        if time.monotonic() - since > (SUBMISSION_SECONDS if going_on else RECORD_SECONDS):
            return False
        time.sleep(POLL_SECONDS)
    return False


def is_cut_short(run: RunDir) -> bool:
    """Whether not all jobs of the run's newest submission have been taken: it goes on, or was killed."""
    submission = queue.read_submission(run)
    return submission is not None and not submission.complete


def _signs_of(run: RunDir) -> tuple[dict[str, float], int]:
    """The jobs on record, and when the record was touched."""
    file = paths.submission(run)
    return queue.on_record(run), file.stat().st_mtime_ns if file.exists() else 0


@contextmanager
def signs_of_life(run: RunDir) -> Generator[None]:
    """While this is open a submission's record is touched: sbatch waits two minutes for room in a full queue."""
    done = threading.Event()

    def touch() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's to hear
        while not done.wait(SIGN_SECONDS):
            with suppress(OSError):
                os.utime(paths.submission(run))

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def stage_of(stage_dir: StageDir, job: str) -> StageDir:
    """The stage that a job is for by now: its own, or a later one that it has taken over at the end of that."""
    later = [one for one in stage_dir.run.stage_dirs() if one.name > stage_dir.name]
    taken = [one for one in later if (record := queue.read_job(one)) and record.id == job]
    return taken[-1] if stage_dir.result.exists() and taken else stage_dir
