"""Whether a stage that trains can still save: what it says of a disk that fails, and what is missing on it."""

import msgspec
from msgspec import Struct

from ftlaunch.run.layout import StageDir
from ftlaunch.run.records import SaveFailure

OVERDUE = 2
"""Checkpoints may be missing, as a save that is slow lets the next one be passed over, but not so many."""


class _Stage(Struct, frozen=True):
    # A merge or an evaluation has no such key, as it saves nothing on the way.
    save_every: int | None = None


class _Spec(Struct, frozen=True):
    """The part of step.json that says how often a stage saves."""

    stage: _Stage


def failing_saves(stage_dir: StageDir, step: int, checkpoint: str | None) -> str | None:
    """What is wrong with the saves of a stage that has taken so many steps; None where they come as they should.

    A disk that takes no checkpoint may not take a word about it either: then the steps since the newest one tell.
    """
    # "…/step-00000100" → 100.
    saved = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    try:
        failure = msgspec.json.decode(stage_dir.save_failure.read_bytes(), type=SaveFailure)
    except (FileNotFoundError, msgspec.DecodeError):
        failure = None
    since = f"the newest checkpoint is of step {saved}" if checkpoint else "there is no checkpoint yet"
    if failure is not None:
        return f"step {failure.step} could not be saved: {failure.cause}; {since}"
    every = msgspec.json.decode(stage_dir.step.read_bytes(), type=_Spec).stage.save_every
    if every is None or step - saved <= OVERDUE * every:
        return None
    return f"saves fail or are slow: one is due every {every} steps, and {since}: see ftlaunch logs --rank 0"
