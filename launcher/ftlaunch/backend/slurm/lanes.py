"""Several runs as jobs of a cluster, some at once; what has finished or is in the queue is not submitted again."""

import time
from collections import Counter
from collections.abc import Sequence

from ftlaunch.backend import runs
from ftlaunch.backend.protocol import Say
from ftlaunch.backend.slurm import jobs, paths, queue, submit
from ftlaunch.backend.status import RunStatus
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import DONE, STAGE_FAILED, Interrupted, UserError
from ftlaunch.processes import lock
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import RunDir

LOOK_SECONDS = 5.0
"""Between two questions to a SLURM controller, which others need too."""
# "unknown" too: while SLURM does not answer, the jobs may be running.
AT_WORK = {"queued", "waiting", "running", "suspended", "unknown"}


def conduct(folders: Sequence[RunDir], cluster: Cluster, at_once: int | None, say: Say) -> int:
    """Submit what has not finished and wait for all of it; the exit code. A failing run does not end the others.

    What is submitted goes by the profile that is given now, also where the run's folder was made with another.

    At most `at_once` runs work at a time: each next one waits in the queue for the end of another, whatever that is,
    so that they need nobody to look after them. UserError where not even one job is taken.
    """
    left, refused = _submit(folders, cluster, at_once)
    told = ""
    while True:
        states = jobs.states(folders)
        if (now := "; ".join(filter(None, (_tally(states, left), refused)))) != told:
            say(told := now)
        if not any(one.state in AT_WORK for one in states):
            if not left:
                return _code(states, say)
            left, refused = _submit(left, cluster, at_once, is_first=False)
        time.sleep(LOOK_SECONDS)


def _submit(
    folders: Sequence[RunDir], cluster: Cluster, at_once: int | None, *, is_first: bool = True
) -> tuple[list[RunDir], str | None]:
    """Submit what is neither finished nor in the queue; what SLURM does not take by now, and why.

    UserError where it takes nothing, and nothing is there to wait for.
    """
    unfinished = [folder for folder in folders if not runs.finished(folder)]
    alive = {
        folder.path
        for folder, answer in zip(unfinished, queue.ask(unfinished), strict=True)
        # Two jobs must never write one folder, so a run of which SLURM says nothing counts as submitted.
        if answer.silent is not None or any(entry.alive for entry in answer.entries.values())
    }
    lanes = [_after(folder) for folder in unfinished if folder.path in alive]
    waiting = [folder for folder in unfinished if folder.path not in alive]
    for number, folder in enumerate(waiting):
        # lanes holds the end of each run in order. With at_once = 2, the third run waits for the first, the fourth for
        # the second: no more than two work at a time.
        after = lanes[-at_once] if at_once and len(lanes) >= at_once else None
        try:
            with lock.hold(folder):
                write_json(paths.cluster(folder), cluster)
            submit.submit(folder, runs.read_plan(folder), after)
        # It is a UserError by type, but means that the user wants to leave and not that SLURM refuses the job.
        except Interrupted:
            raise
        except UserError as error:
            # A limit on a user's jobs lifts when one of them ends, and SLURM counts that one until it has cleaned up
            # after it. With none in the queue from the start, waiting would be in vain.
            if not lanes and (is_first or not isinstance(error, submit.Full)):
                raise
            return waiting[number:], error.message
        lanes.append(_after(folder))
    return [], None


def _after(folder: RunDir) -> str | None:
    """The end of a run, as sbatch takes it, however the run ends."""
    record = next((job for step in reversed(folder.stage_dirs()) if (job := queue.read_job(step))), None)
    # To sbatch a comma means all of them: the job and those that take over when its time is up.
    return ",".join(f"afterany:{id}" for id in record.ids) if record else None


def _tally(states: Sequence[RunStatus], left: Sequence[RunDir]) -> str:
    unsubmitted = {str(folder.path) for folder in left}
    counts = Counter("not submitted yet" if status.path in unsubmitted else status.state for status in states)
    return f"{len(states)} trials: {', '.join(f'{count} {state}' for state, count in sorted(counts.items()))}"


def _code(states: Sequence[RunStatus], say: Say) -> int:
    left = [status for status in states if status.state != "done"]
    for status in left:
        note = next((stage.note for stage in status.stages if stage.state == status.state and stage.note), None)
        say(f"{status.path} is {status.state}{f': {note}' if note else ''}")
    return STAGE_FAILED if left else DONE
