"""How runs stand: the words for it, and what a stage's own files tell whoever has started it."""

import os
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, cast

import msgspec
from msgspec import Struct

from ftlaunch import processes
from ftlaunch.run import progress
from ftlaunch.run.files import read_if_sound, why_unwritable
from ftlaunch.run.layout import RunDir, StageDir
from ftlaunch.run.pace import read_pace
from ftlaunch.run.records import SaveFailure, read_verdict

State = Literal[
    "waiting", "queued", "running", "suspended", "done", "stopped", "cancelled", "failed", "interrupted", "unknown"
]
"""queued: SLURM has not started its job yet, or not again. cancelled: its job was ended, as asked or with another.
interrupted: its processes have gone without a word. unknown: they are, or were, where they cannot be seen from here."""


class StageStatus(Struct, frozen=True, kw_only=True):
    """How one stage stands."""

    name: str
    state: State
    attempts: int
    step: int | None
    """Optimizer steps taken."""
    steps: int | None
    """Optimizer steps in all."""
    loss: float | None
    seconds_left: float | None
    """While it runs."""
    checkpoint: str | None
    """Folder of the newest complete checkpoint."""
    note: str | None
    """The first error, the host it was started on, or what SLURM says."""
    job: str | None = None
    """Its newest SLURM job."""
    nodes: str | None = None
    """Where that runs, in SLURM's short form."""
    start: str | None = None
    """When SLURM guesses that a waiting job will start."""
    warnings: list[str] = []
    """Why rows are computed in another layout than the recipe's, as was found before the first step."""


class RunStatus(Struct, frozen=True, kw_only=True):
    """How a run stands."""

    name: str
    path: str
    state: State
    """That of its first stage that is not done."""
    stages: list[StageStatus]
    changed: list[str] = []
    """Files of data and base that are not what they were when the run began; where they were looked at."""


OVERDUE = 2
"""Checkpoints may be missing, as a save that is slow lets the next one be passed over, but not so many."""
STALLED_SECONDS, STALLED_PAUSES = 20.0, 3.0
"""A step that takes so long, and so many times the longest pause of its attempt, is told."""
# Hence the cast: `step` is a required key of an entry, and before the first step there is none.
_NOTHING = cast(progress.Entry, {})


def measured(stage_dir: StageDir, attempts: int, state: State, note: str | None) -> StageStatus:
    """The status of a stage with what its metrics tell."""
    entries = progress.newest(stage_dir.metrics)
    last = next((entry for entry in reversed(entries) if not progress.is_evaluation(entry)), _NOTHING)
    if state == "running" and note is None and (preparing := progress.read_preparing(stage_dir.preparing)):
        note = preparing.describe()
    checkpoint = newest_checkpoint(stage_dir)
    if state in ("running", "unknown") and "step" in last:
        notes = [note, _failing_saves(stage_dir, last["step"], checkpoint)]
        if state == "running":
            notes.append(_stalled(stage_dir, entries) or ((pace := read_pace(stage_dir)) and pace.describe()))
        note = "; ".join(filter(None, notes)) or None
    return StageStatus(
        name=stage_dir.name,
        state=state,
        attempts=attempts,
        step=last.get("step"),
        steps=last.get("steps"),
        loss=last.get("loss"),
        seconds_left=progress.seconds_left(entries) if state == "running" else None,
        checkpoint=checkpoint,
        note=note,
        warnings=read_verdict(stage_dir.probe).get("warnings", []),
    )


class _Stage(Struct, frozen=True):
    # A merge or an evaluation has no such key, as it saves nothing on the way.
    save_every: int | None = None


class _Spec(Struct, frozen=True):
    """The part of step.json that says how often a stage saves."""

    stage: _Stage


def _failing_saves(stage_dir: StageDir, step: int, checkpoint: str | None) -> str | None:
    """What is wrong with the saves of a stage that has taken so many steps; None where they come as they should.

    A disk that takes no checkpoint may not take a word about it either: then the steps since the newest one tell.
    """
    # "…/step-00000100" → 100.
    saved = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    failure = read_if_sound(stage_dir.save_failure, SaveFailure)
    since = f"the newest checkpoint is of step {saved}" if checkpoint else "there is no checkpoint yet"
    if failure is not None:
        return f"step {failure.step} could not be saved: {failure.cause}; {since}"
    every = msgspec.json.decode(stage_dir.step.read_bytes(), type=_Spec).stage.save_every
    if every is None or step - saved <= OVERDUE * every:
        return None
    return f"saves fail or are slow: one is due every {every} steps, and {since}: see ftlaunch logs --rank 0"


def _stalled(stage_dir: StageDir, entries: Sequence[progress.Entry]) -> str | None:
    """What is said of an attempt that takes no steps any more; None of one that takes them as it did before."""
    attempts = stage_dir.all_attempts()
    process = attempts[-1].process if attempts else stage_dir.metrics
    began = process.stat().st_mtime if process.exists() else 0.0  # by the clock of the node, which metrics go by
    times = [when for entry in entries if (when := entry.get("time", 0.0)) >= began]
    pauses = [after - before for before, after in pairwise(times)]
    patience = max(STALLED_SECONDS, STALLED_PAUSES * max(pauses, default=0.0))
    if not pauses or time.time() - times[-1] < patience:
        return None
    if unwritable := why_unwritable(stage_dir.path):  # each attempt to write renews the file's time, and adds nothing
        return f"steps are no longer on record: {stage_dir.path} cannot be written: {unwritable}"
    if (silent := _silence(stage_dir)) < patience:
        return None
    ranks = processes.ranks_of(attempts[-1].path, range(stage_dir.read_spec().world_size)) if attempts else {}
    stopped = [f"rank {rank}" for rank, pid in ranks.items() if processes.state(pid) == "T"]
    why = f": {', '.join(stopped)} stopped by a signal" if stopped else ""
    return f"no step for {progress.duration(silent)}{why}"


def _silence(stage_dir: StageDir) -> float:
    """Seconds since the metrics were written, by the file system's clock: that of a node may be minutes off ours."""
    try:
        with tempfile.TemporaryFile(dir=stage_dir.path) as file:
            now = os.fstat(file.fileno()).st_mtime
    except OSError:  # a full disk, or somebody else's run
        now = time.time()
    return now - stage_dir.metrics.stat().st_mtime


def run_status(run: RunDir, stages: Sequence[StageStatus]) -> RunStatus:
    """How a run stands as a whole: as its first stage that is not done."""
    states: list[State] = [*(stage.state for stage in stages if stage.state != "done"), "done"]
    return RunStatus(name=run.path.name, path=str(run.path), state=states[0], stages=[*stages])


def newest_checkpoint(stage_dir: StageDir) -> str | None:
    """The folder of the newest checkpoint that was written to its end."""
    # Names such as step-00000200 sort by step. A save in progress has a hidden name: .step-00000300.partial.
    complete = sorted(path.parent for path in stage_dir.checkpoints.glob("step-*/manifest.json"))
    return str(complete[-1]) if complete else None
