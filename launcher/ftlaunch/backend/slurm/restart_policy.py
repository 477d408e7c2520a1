"""Whether a failed attempt of a SLURM job is worth another: judged by its cause and by how far it came."""

import re
from itertools import takewhile

import msgspec
from msgspec import Struct

from ftlaunch.backend.slurm import paths
from ftlaunch.processes.outcome import TAKEN, Done, Failure, Outcome, Stopped
from ftlaunch.run.files import read_json
from ftlaunch.run.layout import Attempt

MEMORY = re.compile(r"out.of.memory|outofmemory|\boom\b|cannot allocate memory", re.IGNORECASE)
ECHO = re.compile(
    r"connection (?:was |has been )?(?:closed|reset|refused)|broken pipe|\bgloo|\bnccl|timed? ?out|\bsocket\b|\bpeer"
    r"|\bDist(?:Network|Store|Backend)Error|\b(?:TCP|File|Prefix)Store\b",
    re.IGNORECASE,
)
"""What ranks say when it was another rank or the network that failed them."""


GIVEN_UP, GOES_ON = "not started again", "goes on from the newest checkpoint"
"""Words of a reason that stand for a decision of ours, and not for one that SLURM takes."""
FRUITLESS = 3
"""Starts in a row that SLURM may end, perhaps early, before a checkpoint was made."""


class AttemptRecord(Struct, frozen=True, kw_only=True):
    """How one attempt of a job ended."""

    job: str
    restart: int
    """How often the stage had been started before."""
    nodes: list[str]
    cause: str
    """done, stopped, preempted, failed or lost: of a node that could not say it."""
    step: int | None
    """The last optimizer step that was taken."""
    checkpoint: str | None
    """The newest checkpoint."""
    lost: list[str]
    """Nodes that have not said how their processes ended."""
    restarted: bool
    """Whether the stage was started again."""
    reason: str
    """What was decided, and why."""
    in_place: bool = False
    """Whether that was inside the job, on its nodes; otherwise the job went back into the queue."""


def read_ended(attempt: Attempt) -> AttemptRecord | None:
    """How an attempt ended; None while, or where, its job has not said so."""
    return read_json(paths.ended(attempt), AttemptRecord)


def decide_restart(
    outcome: Outcome,
    now: AttemptRecord,
    before: list[AttemptRecord],
    most: int,
    *,
    warned: bool,
    asked: bool,
    died_of: str,
) -> AttemptRecord:
    """How an attempt ended, with what is to be done about it. `now` is what is known of it, as if it were done.

    `warned`: SLURM has said that it would end the job. `asked`: the user wants the run to stop. `died_of`: a failure
    in words.
    """
    match outcome:
        case Done():
            return now
        case Stopped(step=step) if asked:
            return msgspec.structs.replace(now, cause="stopped", step=step, reason="as asked")
        case Stopped(step=step):
            now = msgspec.structs.replace(now, cause="preempted", step=step)
            return _with_decision(now, objection_after_preemption(now, before, most), "saved")
        case Failure() if warned:
            now = msgspec.structs.replace(now, cause="preempted")
            return _with_decision(now, objection_after_preemption(now, before, most), "not saved")
        case Failure():
            now = msgspec.structs.replace(now, cause="failed")
            return _with_decision(now, objection_after_failure(outcome, now, before, most), died_of)


def _with_decision(now: AttemptRecord, objection: str | None, what: str) -> AttemptRecord:
    """Return the record with the decision, which is to go on unless something speaks against it."""
    decision = f"{GIVEN_UP}: {objection}" if objection else GOES_ON
    return msgspec.structs.replace(now, restarted=objection is None, reason=f"{what}; {decision}")


def what_happened(reason: str) -> str:
    """Return the part of a reason that was there before the decision."""
    return re.split(f"; (?:{GIVEN_UP}|{GOES_ON})", reason)[0]


def objection_after_failure(failure: Failure, now: AttemptRecord, before: list[AttemptRecord], most: int) -> str | None:
    """Why a failed attempt is not started again; None where it is. `before` are the job's earlier attempts."""
    if failure.user_error:
        return "it would only fail again"
    if ran_out_of_memory(failure):
        return "it ran out of memory"
    if now.restart >= most:
        return f"it has been restarted {now.restart} times (max_restarts)"
    failed = [ended for ended in before if ended.cause == "failed"]
    # Two failures at one step point to the data or the code, not to a node.
    if failed and failed[-1].step == now.step:
        where = "before its first step" if now.step is None else f"after step {now.step}"
        return f"it failed twice at the same place, {where}"
    if failed and failed[-1].checkpoint == now.checkpoint:
        return "it has made no checkpoint since the failure before"
    if now.step is None and not from_outside(failure):
        return "it failed before its first step"
    return None


def objection_after_preemption(now: AttemptRecord, before: list[AttemptRecord], most: int) -> str | None:
    """Why an attempt that SLURM wanted to end does not go on later; None where it does."""
    if now.restart >= most:
        return f"it has been restarted {now.restart} times (max_restarts)"
    # Failed starts count as well: they made no checkpoint either. Those that lost a node say nothing about the time.
    told = [ended for ended in reversed(before) if ended.cause != "lost"]
    fruitless = 1 + len(list(takewhile(lambda ended: ended.checkpoint == now.checkpoint, told)))
    if fruitless > FRUITLESS:
        return f"{fruitless} starts in a row have made no checkpoint; allow more time_limit or signal_lead"
    return None


def ran_out_of_memory(failure: Failure) -> bool:
    """Return whether a rank ran out of memory, of the GPU's or the node's."""
    return MEMORY.search(f"{failure.type} {failure.message}") is not None


def from_outside(failure: Failure) -> bool:
    """Whether a rank was killed, lost its peers or found its port taken, rather than did something wrong."""
    return failure.type in ("Hang", TAKEN) or failure.type.startswith("SIG") or is_peer_error(failure)


def is_peer_error(failure: Failure) -> bool:
    """Whether the error only says that somebody else has gone."""
    return ECHO.search(f"{failure.type} {failure.message}") is not None
