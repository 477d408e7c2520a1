"""How runs stand, read from their folders and the process table of this machine."""

from collections.abc import Sequence
from typing import cast

import msgspec
from msgspec import Struct

from ftlaunch import processes
from ftlaunch.cluster import queue
from ftlaunch.cluster.queue import Answer
from ftlaunch.processes import Identity, lock
from ftlaunch.processes.outcome import Done, Failure, Stopped, read_outcome
from ftlaunch.run import progress
from ftlaunch.run.layout import Attempt, RunDir, StageDir
from ftlaunch.run.preparing import read_preparing
from ftlaunch.watch import jobs, runs
from ftlaunch.watch.jobs import State
from ftlaunch.watch.saves import failing_saves


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


class RunStatus(Struct, frozen=True, kw_only=True):
    """How a run stands."""

    name: str
    path: str
    state: State
    """That of its first stage that is not done."""
    stages: list[StageStatus]
    changed: list[str] = []
    """Files of data and base that are not what they were when the run began; where they were looked at."""


_NOTHING = cast(progress.Entry, {})
_DRIVEN: dict[bool | None, State] = {True: "running", False: "waiting", None: "unknown"}


def read_all(every: Sequence[RunDir]) -> list[RunStatus]:
    """How runs stand, in their order; SLURM is asked once for all of those that are not finished."""
    asked = [run for run in every if run.cluster.exists() and not runs.finished(run)]
    answers = {run.path: answer for run, answer in zip(asked, queue.ask(asked), strict=True)}
    return [_scheduled(run, answers.get(run.path, Answer())) if run.cluster.exists() else _local(run) for run in every]


def read_status(run: RunDir) -> RunStatus:
    """How a run and its stages stand now."""
    return _scheduled(run, queue.ask([run])[0]) if run.cluster.exists() else _local(run)


def _local(run: RunDir) -> RunStatus:
    driver = lock.holder(run)
    stages = [_stage_status(stage_dir, driver) for stage_dir in run.stage_dirs()]
    states: list[State] = [*(stage.state for stage in stages if stage.state != "done"), "done"]
    state = states[0]
    if state == "waiting" and driver:  # between two stages, or about to start the first
        state = _DRIVEN[processes.is_alive(driver)]
    return RunStatus(name=run.path.name, path=str(run.path), state=state, stages=stages)


def _stage_status(stage_dir: StageDir, driver: Identity | None) -> StageStatus:
    attempts = stage_dir.all_attempts()
    return _measured(stage_dir, len(attempts), *_state(stage_dir, attempts, driver))


def _measured(stage_dir: StageDir, attempts: int, state: State, note: str | None) -> StageStatus:
    """The status of a stage with what its metrics tell."""
    entries = progress.newest(stage_dir.metrics)
    last = next((entry for entry in reversed(entries) if not progress.is_evaluation(entry)), _NOTHING)
    if state == "running" and note is None and (preparing := read_preparing(stage_dir.preparing)):
        note = preparing.describe()
    checkpoint = newest_checkpoint(stage_dir)
    if state in ("running", "unknown") and "step" in last:
        notes = [note, failing_saves(stage_dir, last["step"], checkpoint)]
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
    )


def _state(stage_dir: StageDir, attempts: list[Attempt], driver: Identity | None) -> tuple[State, str | None]:
    """The state that the newest attempt leaves a stage in, and what there is to say of it."""
    if not attempts:
        return ("done" if stage_dir.result.exists() else "waiting"), None
    newest = attempts[-1]
    involved = [who for who in (driver, _launcher(newest)) if who]
    # Looked up first: an attempt may end, and say how, right after it was found alive.
    alive = {processes.is_alive(who): who.host for who in involved}
    match read_outcome(stage_dir, newest):
        case Done():
            return "done", None
        case Stopped():
            return "stopped", None
        case Failure(rank=rank, message=message):
            first_line = message.partition("\n")[0]
            return "failed", first_line if rank is None else f"rank {rank}: {first_line}"
        case None if True in alive:
            return "running", None
        case None if None in alive:
            return "unknown", f"started on {alive[None]}"
        case None:
            return "interrupted", None


def _scheduled(run: RunDir, answer: Answer) -> RunStatus:
    """How a run stands whose stages are SLURM jobs."""
    steps = run.stage_dirs()
    first = next((stage_dir for stage_dir in steps if not stage_dir.result.exists()), None)
    stages = [_scheduled_stage(stage_dir, answer, first) for stage_dir in steps]
    states: list[State] = [*(stage.state for stage in stages if stage.state != "done"), "done"]
    return RunStatus(name=run.path.name, path=str(run.path), state=states[0], stages=stages)


def _scheduled_stage(stage_dir: StageDir, answer: Answer, first: StageDir | None) -> StageStatus:
    job, entry = queue.read_job(stage_dir), answer.of(stage_dir)
    stage = _measured(stage_dir, len(stage_dir.all_attempts()), *jobs.stage_state(stage_dir, answer, first))
    waits = entry is not None and entry.state == "PENDING"
    return msgspec.structs.replace(
        stage,
        job=entry.id if entry else job.id if job else None,
        nodes=entry.nodes if entry else None,
        start=entry.start if entry and waits else None,
    )


def _launcher(attempt: Attempt) -> Identity | None:
    """The process that launched an attempt; None where it has not been started yet."""
    if not attempt.process.exists():
        return None
    return msgspec.json.decode(attempt.process.read_bytes(), type=Identity)


def newest_checkpoint(stage_dir: StageDir) -> str | None:
    """The folder of the newest checkpoint that was written to its end."""
    complete = sorted(path.parent for path in stage_dir.checkpoints.glob("step-*/manifest.json"))
    return str(complete[-1]) if complete else None


def is_over(run: RunDir) -> bool:
    """Whether nothing of a run works any more. False where that cannot be seen from here, unless it has signed off."""
    if run.cluster.exists():
        answer = queue.ask([run])[0]
        return answer.silent is None and not any(entry.alive for entry in answer.entries.values())
    driver = lock.holder(run)
    return (driver is None or processes.is_alive(driver) is False) and not processes.of_attempts(run.path)
