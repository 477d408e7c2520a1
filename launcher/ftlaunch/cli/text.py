"""How plans, runs and tables look as text."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ftlaunch.backend.protocol import Foreseen
    from ftlaunch.backend.status import RunStatus, StageStatus
    from ftlaunch.plan.plan import Plan, PlannedStage


def as_json(value: Any) -> str:
    """A value, structs included, as readable JSON."""
    import msgspec

    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows below a head, in columns as wide as they need to be."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def processes(count: int) -> str:
    """Return a number of processes in words, such as "1 process" or "2 processes"."""
    return f"{count} process{'es' if count > 1 else ''}"


def summary(plan: "Plan") -> str:
    """A plan in a few lines: each stage with what was derived for it."""
    return "\n".join(
        [f"{plan.name} → {plan.run_dir}", *(line for planned in plan.stages for line in _summary(planned))]
    )


def _summary(planned: "PlannedStage") -> Iterator[str]:
    parallel = planned.spec.parallel
    yield ", ".join(
        [
            f"{planned.name}: {processes(planned.spec.world_size)}",
            *([f"{parallel.nodes} nodes"] if parallel.nodes > 1 else []),
            *([parallel.strategy] if parallel.strategy != "single" else []),
            *(["offloaded to host memory"] if parallel.offload != "none" else []),
            *({"auto": [], "cpu": ["on the CPU"], "cuda": ["on GPUs"]}[parallel.device]),
        ]
    )
    width = max(map(len, planned.notes), default=0)
    yield from (f"    {label.ljust(width)}  {note}" for label, note in planned.notes.items())


def variants(plans: "Mapping[str, Plan]") -> str:
    """The first plan in a summary; of each other one, by its label, what is noted otherwise than in the first."""
    (label, first), *others = plans.items()
    known = {(planned.name, *note) for planned in first.stages for note in planned.notes.items()}
    parts = [f"{label}\n{summary(first)}"]
    for label, plan in others:
        noted = [(planned.name, *note) for planned in plan.stages for note in planned.notes.items()]
        parts.append("\n".join([label, *(f"    {'  '.join(note)}" for note in noted if note not in known)]))
    return "\n\n".join(parts)


def full(plan: "Plan", foreseen: "Foreseen") -> str:
    """A plan with every command and every file, as they will be used, what it costs and what a scheduler is asked."""
    from ftlaunch.plan.cost import words

    parts = [
        summary(plan),
        *(f"── {name} costs\n{words.of_stage(cost)}" for name, cost in foreseen.costs.items()),
        *(f"── {planned.name} is started with\n{command(plan, planned)}" for planned in plan.stages),
    ]
    for name, request in foreseen.requests.items():
        saving = f"\n   and is asked to save {request.saving}" if request.saving else ""
        terms = f"for {request.price},\n   with {request.cpus},{saving}"
        parts.append(f"── {name} is submitted with sbatch, {terms} as\n{request.script.rstrip()}")
    if foreseen.variables:
        lines = "\n".join(f"{name}={value}" for name, value in foreseen.variables.items())
        parts.append(f"── variables of this shell and the profile, which the stages' processes are given\n{lines}")
    for planned in plan.stages:
        parts += [f"── {planned.name}/{name}\n{content.rstrip()}" for name, content in planned.files.items()]
    return "\n\n".join(parts)


def command(plan: "Plan", planned: "PlannedStage") -> str:
    """The line that a shell would start a stage with."""
    variables = ["env", *(f"{key}={value}" for key, value in planned.env.items())] if planned.env else []
    return f"cd {shlex.quote(plan.run_dir)} && {shlex.join([*variables, *planned.command])}"


def run_status(status: "RunStatus") -> str:
    """One run, a line for each of its stages."""
    head = ("stage", "state", "attempts", "step", "loss", "left", "checkpoint")
    rows = [
        (stage.name, stage.state, str(stage.attempts), _steps(stage), _loss(stage), _left(stage), _checkpoint(stage))
        for stage in status.stages
    ]
    # A run on this machine has no jobs and gets no empty columns.
    if any(stage.job for stage in status.stages):
        head = (*head, "job", "nodes")
        rows = [(*row, stage.job or "", stage.nodes or "") for row, stage in zip(rows, status.stages, strict=True)]
    notes = [f"{stage.name}: {stage.note}" for stage in status.stages if stage.note]
    notes += [f"{stage.name}: {warning}" for stage in status.stages for warning in stage.warnings]
    notes += [f"{stage.name}: SLURM guesses a start at {stage.start}" for stage in status.stages if stage.start]
    notes += status.changed
    return "\n".join([f"{status.name}  {status.state}  {status.path}", "", table(head, rows), *notes, *_next(status)])


def _next(status: "RunStatus") -> Iterator[str]:
    """What the user of a run that does not work any more may want to do."""
    from ftlaunch.run import outputs
    from ftlaunch.run.layout import RunDir

    path = shlex.quote(status.path)
    if status.state == "done" and (told := outputs.describe(RunDir(Path(status.path)))):
        yield told
    if status.state == "failed":
        yield f"  → what went wrong: ftlaunch logs {path} --first-error"
    if status.state in ("failed", "stopped", "interrupted"):
        yield f"  → go on with it: ftlaunch resume {path}"


def run_list(statuses: Sequence["RunStatus"]) -> str:
    """Several runs, a line each: the stage that counts is the first that is not done."""
    rows: list[tuple[str, ...]] = []
    for status in statuses:
        stage = next((stage for stage in status.stages if stage.state != "done"), status.stages[-1])
        rows.append((status.name, status.state, stage.name, _steps(stage), _loss(stage), _left(stage), status.path))
    return table(("run", "state", "stage", "step", "loss", "left", "folder"), rows)


def _steps(stage: "StageStatus") -> str:
    if stage.step is None:
        return ""
    return f"{stage.step}/{stage.steps}" if stage.steps else str(stage.step)


def _loss(stage: "StageStatus") -> str:
    return "" if stage.loss is None else f"{stage.loss:.4f}"


def _left(stage: "StageStatus") -> str:
    from ftlaunch.run.progress import duration

    return "" if stage.seconds_left is None else duration(stage.seconds_left)


def _checkpoint(stage: "StageStatus") -> str:
    return (stage.checkpoint or "").rpartition("/")[2]
