"""What the tasks of a job tell each other, by files in the stage's folder: nodes share nothing else for certain."""

from pathlib import Path

from msgspec import Struct

from ftlaunch.backend.slurm import paths
from ftlaunch.backend.watchdog import RankState
from ftlaunch.processes.outcome import Failure
from ftlaunch.run.files import read_json
from ftlaunch.run.layout import Attempt, StageDir


class MadeBy(Struct, frozen=True, kw_only=True):
    """made_by.json: the start of a job that an attempt belongs to. Nobody else may conclude it."""

    job: str
    restart: int
    """SLURM's own count of how often the job was put back into the queue."""
    nodes: list[str] = []
    """Nodes that that start trained on."""


class HeadNotice(Struct, frozen=True, kw_only=True):
    """The first node's word to the others."""

    attempt: int | None
    """None: there is nothing to do any more."""
    address: str | None = None
    port: int | None = None
    following: str | None = None
    """Where there is nothing to do any more: the stage that this job takes over, for which the queue has no room."""


class NodeReport(Struct, frozen=True, kw_only=True):
    """How the processes of one node ended."""

    exit_code: int
    killed: Failure | None
    """What ended a rank from outside, if anything did."""
    ranks: list[RankState] = []
    """What its ranks were at, where the attempt was found to hang."""


def start_file(stage_dir: StageDir, made_by: MadeBy, number: int) -> Path:
    """Where a job's first node says what the others are to do, counted from 0 over the starts inside the job."""
    # "1234.0.2.json" is the third start in job 1234 before any requeue: old notices are never read again.
    return paths.jobs(stage_dir) / f"{made_by.job}.{made_by.restart}.{number}.json"


def clear(stage_dir: StageDir) -> None:
    """Remove what earlier jobs were told: SLURM may give their ids again."""
    for file in paths.jobs(stage_dir).glob("[0-9]*.json"):
        file.unlink(missing_ok=True)


def read_made_by(attempt: Attempt) -> MadeBy | None:
    """None where an attempt does not say so, as those of this machine do not."""
    return read_json(paths.made_by(attempt), MadeBy)


def is_of(attempt: Attempt, start: MadeBy) -> bool:
    """Whether an attempt belongs to a start of a job."""
    made_by = read_made_by(attempt)
    return made_by is not None and (made_by.job, made_by.restart) == (start.job, start.restart)


def read_verdict(attempt: Attempt, node: int) -> NodeReport | None:
    """None where the node has not said how its processes ended."""
    return read_json(paths.report(attempt, node), NodeReport)
