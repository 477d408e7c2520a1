"""A run folder → the facts that a report shows, whatever state the run is in."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import msgspec
from msgspec import NODEFAULT, Struct

from ftlaunch.backend import runs
from ftlaunch.backend.slurm.restart_policy import read_ended
from ftlaunch.backend.status import StageStatus
from ftlaunch.errors import UserError
from ftlaunch.plan.plan import Plan
from ftlaunch.processes.outcome import read_failure
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.recipe.stages import Training
from ftlaunch.run.files import read_json, read_jsonl
from ftlaunch.run.layout import Attempt, RunDir, StageDir
from ftlaunch.run.progress import Entry, MetricsTail, all_entries, is_evaluation, newest
from ftlaunch.run.records import Result, Stopped, read_result, read_verdict
from ftlaunch.run.spec import StageSpec
from ftlaunch.watch.status import read_status

SAMPLES = 5
"""Predictions that a report shows, and answers of the first and of the last rollouts."""


class AttemptFacts(Struct, frozen=True, kw_only=True):
    """One start of a stage's processes."""

    number: int
    began: float | None
    """Unix seconds, as are the others. None: it has not been started."""
    ended: float | None
    """While it runs, when it was last heard of."""
    outcome: str
    """done, stopped, failed, interrupted, preempted, lost, running or unknown."""
    cause: str
    """Why it ended; empty where there is nothing to add."""


class StageFacts(Struct, frozen=True, kw_only=True):
    """One stage, from its folder."""

    status: StageStatus
    spec: StageSpec
    notes: dict[str, str]
    """What the plan says of it."""
    trained: list[Entry]
    """A line for each optimizer step, each step once."""
    evaluated: list[Entry]
    attempts: list[AttemptFacts]
    result: Result | None
    """None while there is none, or where another version of ftlaunch has written it."""
    verdict: dict[str, Any]
    """What was found before the first step; empty where nothing was tried."""
    left: dict[str, Any]
    """Content of result.json as it is; empty while there is none."""
    predictions: list[dict[str, Any]]
    """The first of an evaluate stage's predictions."""
    drawn: list[Entry]
    """The first and the newest answers that training itself has left."""
    model_bytes: int
    """Weights in the artifact, or in the merged model."""

    @property
    def kind(self) -> str:
        return str(self.spec.stage.__struct_config__.tag)

    @property
    def is_training(self) -> bool:
        return isinstance(self.spec.stage, Training)

    @property
    def seconds(self) -> float:
        """Time that its attempts have taken, without the pauses between them."""
        return sum(one.ended - one.began for one in self.attempts if one.began and one.ended)


class RunFacts(Struct, frozen=True, kw_only=True):
    """A whole run."""

    name: str
    path: Path
    state: str
    recipe: Recipe
    stages: list[StageFacts]
    provenance: dict[str, Any]


def last_shared_training(runs: Sequence[RunFacts]) -> list[StageFacts]:
    """Each run's stage of the last training that all of them have begun; empty where there is none."""
    begun = [{(one.status.name): one for one in run.stages if one.is_training and one.trained} for run in runs]
    shared = [name for name in begun[0] if all(name in stages for stages in begun)]
    return [stages[shared[-1]] for stages in begun] if shared else []


def read_run(run: RunDir) -> RunFacts:
    """The facts of a run as they are now. UserError where its folder is of another version of ftlaunch."""
    status = read_status(run)
    plan = runs.read_plan(run)
    stages = [_stage(run.stage_dir(one.name), one, plan) for one in status.stages]
    return RunFacts(
        name=run.path.name,
        path=run.path,
        state=status.state,
        recipe=plan.recipe,
        stages=stages,
        provenance=read_json(run.provenance, dict[str, Any]) or {},
    )


def _stage(folder: StageDir, status: StageStatus, plan: Plan) -> StageFacts:
    planned = next((one for one in plan.stages if one.name == folder.name), None)
    if planned is None:
        raise UserError(f"{folder.path} is no stage of the run's plan", "remove the folder, or restore plan.json")
    entries = all_entries(folder.metrics)
    weights = [*folder.artifact.glob("*.safetensors"), *folder.model.glob("*.safetensors")]
    return StageFacts(
        status=status,
        spec=planned.spec,
        notes=planned.notes,
        trained=[entry for entry in entries if not is_evaluation(entry)],
        evaluated=[entry for entry in entries if is_evaluation(entry)],
        attempts=list(_attempts(folder, status, entries)),
        result=read_result(folder.result, folder.kind),
        verdict=read_verdict(folder.probe),
        left=read_json(folder.result, dict[str, Any]) or {},
        predictions=list(islice(read_jsonl(folder.predictions), SAMPLES)),
        drawn=_drawn(folder.samples),
        model_bytes=sum(path.stat().st_size for path in weights),
    )


def _drawn(path: Path) -> list[Entry]:
    first, last = MetricsTail(path).read()[:SAMPLES], newest(path)[-SAMPLES:]
    return [*first, *(entry for entry in last if entry not in first)]


def _attempts(folder: StageDir, status: StageStatus, entries: list[Entry]) -> Iterator[AttemptFacts]:
    attempts = folder.all_attempts()
    for attempt in attempts:
        is_last = attempt is attempts[-1]
        outcome, cause = _end(attempt, status if is_last else None)
        times = [_modified(attempt.path / name) for name in ("process.json", "process1.json", "launch.log")]
        began = next((time for time in times if time is not None), None)
        yield AttemptFacts(
            number=attempt.number,
            began=began,
            ended=_last_sign(folder, attempt, entries, is_last=is_last),
            outcome=outcome,
            cause=cause,
        )


def _end(attempt: Attempt, status: StageStatus | None) -> tuple[str, str]:
    """How an attempt ended, and why; `status` is the stage's where the attempt is the newest."""
    # Of a stage that waits in the queue again, the newest attempt is over.
    if status is not None and status.state in ("done", "running"):
        return status.state, ""
    # Before stopped.json: to the trainer a preemption and a stop by the user are the same, and only the job's own
    # record tells them apart.
    if ended := read_ended(attempt):
        return ended.cause, ended.reason
    if stopped := read_json(attempt.stopped, Stopped):
        return "stopped", stopped.reason + (f", saved at step {stopped.step}" if stopped.step is not None else "")
    if failure := read_failure(attempt):
        remedy = f" → {failure.remedy}" if failure.remedy else ""
        return "failed", f"{failure.who}{failure.message.strip()}{remedy}"
    if status is not None and status.state == "unknown":
        return "unknown", status.note or ""
    return "interrupted", "its processes have gone without a word"


def _last_sign(folder: StageDir, attempt: Attempt, entries: list[Entry], *, is_last: bool) -> float | None:
    """When an attempt was last heard of."""
    times = [_modified(path) for path in attempt.path.glob("*.*")]
    if is_last:
        # Result and metrics belong to the stage, so they tell only of its newest attempt.
        times += [_modified(folder.result), entries[-1].get("time") if entries else None]
    return max((time for time in times if time is not None), default=None)


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of a nested one under its key path: `stage.0.epochs`, `model.path`."""
    parts = _parts(value)
    if not parts:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, child in parts:
        found |= flattened(child, f"{prefix}.{key}" if prefix else key)
    return found


def _parts(value: object) -> list[tuple[str, Any]]:
    """The children of a table, or of a list that holds tables, by their keys; none of anything else."""
    match value:
        case dict():
            return list(cast("dict[str, Any]", value).items())
        # A list of plain values, such as targets = ["q_proj", "v_proj"], stays one value.
        case list() if any(isinstance(each, dict | Struct) for each in cast("list[Any]", value)):
            return [(str(index), each) for index, each in enumerate(cast("list[Any]", value))]
        case _:
            return []


def changed_keys(recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys of a recipe that are not at their default → (value, default); None for keys that have no default."""
    return dict(_changed(recipe, ""))


def _changed(table: Struct, prefix: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for field in msgspec.structs.fields(table):
        own, default, path = getattr(table, field.name), _default(field), f"{prefix}{field.encode_name}"
        children = [(path, own)] if isinstance(own, Struct) else [(f"{path}.{key}", one) for key, one in _parts(own)]
        if not any(isinstance(child, Struct) for _, child in children):
            if own != default:
                yield path, (msgspec.to_builtins(own), None if default is NODEFAULT else msgspec.to_builtins(default))
            continue
        for name, child in children:
            # The kind of an adapter or a stage is the tag of its struct and not a field, so fields() does not show it.
            tag = child.__struct_config__.tag
            if tag and type(child) is not type(default):
                yield f"{name}.kind", (tag, None)
            yield from _changed(child, f"{name}.")


def _default(field: msgspec.structs.FieldInfo) -> Any:
    """The default of a key; NODEFAULT without one, as None may be the default itself."""
    return field.default if field.default_factory is NODEFAULT else field.default_factory()
