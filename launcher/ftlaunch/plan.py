"""Recipe → Plan: what will be started, with which files, in which order. Pure: nothing is written or looked up."""

import hashlib
from pathlib import Path

import msgspec
from msgspec import Struct

from ftlaunch import node, resolve
from ftlaunch.recipe import Full, Lora, Merge, Recipe, Sft, Stage
from ftlaunch.rundir import Step

LEARNING_RATE = {Lora: 2e-4, Full: 2e-5}
"""Peak learning rates that suit each kind of adapter when the recipe names none."""


class PlannedStep(Struct, frozen=True, kw_only=True):
    """One stage, ready to start."""

    name: str
    """Name of its folder: `01-sft`."""
    step: Step
    files: dict[str, str]
    """File name → exact content, in the step folder."""
    command: list[str]
    """Argument vector; the working directory is the run folder."""
    env: dict[str, str]
    """Set on top of the caller's environment."""
    notes: list[str]
    """Derived values that the recipe left open."""


class Plan(Struct, frozen=True, kw_only=True):
    """A whole run, ready to start. What is printed is what is submitted."""

    name: str
    run_dir: str
    recipe: Recipe
    steps: list[PlannedStep]


def make_plan(recipe: Recipe, run_dir: Path) -> Plan:
    """Plan a recipe that has passed `rules.check`. `run_dir` is where the run will be, made absolute."""
    recipe_hash = hashlib.sha256(msgspec.json.encode(recipe)).hexdigest()
    names = [f"{index:02d}-{_kind(stage)}" for index, stage in enumerate(recipe.stage, start=1)]
    starts = [None, *(f"{name}/artifact" for name in names[:-1])]
    steps = [
        _plan_step(name, _make_step(recipe, stage, start, recipe_hash))
        for name, stage, start in zip(names, recipe.stage, starts, strict=True)
    ]
    return Plan(name=recipe.name, run_dir=str(run_dir.absolute()), recipe=recipe, steps=steps)


def _kind(stage: Stage) -> str:
    return str(stage.__struct_config__.tag)


def _make_step(recipe: Recipe, stage: Stage, start: str | None, recipe_hash: str) -> Step:
    resolved = resolve.for_stage(recipe, stage)
    micro, accumulation, learning_rate, data = 1, 1, 0.0, {}
    if isinstance(stage, Sft):
        micro = stage.micro_batch_size or stage.batch_size // resolved.world_size
        accumulation = stage.batch_size // (micro * resolved.world_size)
        learning_rate = stage.learning_rate or LEARNING_RATE[type(resolved.adapter)]
        names = [stage.data] if isinstance(stage.data, str) else stage.data
        data = {name: recipe.data[name] for name in names}
    return Step(
        name=recipe.name,
        stage=stage,
        model=resolved.model,
        adapter=resolved.adapter,
        optimizer=resolved.optimizer,
        parallel=resolved.parallel,
        data=data,
        seed=recipe.seed,
        deterministic=recipe.deterministic,
        world_size=resolved.world_size,
        micro_batch_size=micro,
        accumulation=accumulation,
        learning_rate=learning_rate,
        start=start,
        recipe_hash=recipe_hash,
    )


def _plan_step(name: str, step: Step) -> PlannedStep:
    files = {"step.json": msgspec.json.format(msgspec.json.encode(step), indent=2).decode() + "\n"}
    files["accelerate.yaml"] = node.accelerate_yaml(step, name)
    deepspeed = node.deepspeed_json(step)
    if deepspeed is not None:
        files["deepspeed.json"] = deepspeed
    return PlannedStep(
        name=name,
        step=step,
        files=files,
        command=node.command(name),
        env=node.environment(step.parallel),
        notes=list(_notes(step)),
    )


def _notes(step: Step) -> list[str]:
    stage = step.stage
    if isinstance(stage, Merge):
        return [f"merges {step.start} and checks the merged model against the adapter model"]
    notes = [
        f"batch of {stage.batch_size} rows = {step.micro_batch_size} a micro-batch"
        f" × {step.accumulation} accumulated × {step.world_size} process{'es' if step.world_size > 1 else ''}"
    ]
    if stage.learning_rate is None:
        notes.append(f"learning rate {step.learning_rate:g}, as none is given")
    if stage.steps is None and stage.epochs is None:
        notes.append("1 epoch, as neither epochs nor steps is given")
    if isinstance(step.adapter, Lora):
        notes.append(f"adapter scale alpha / rank = {step.adapter.alpha / step.adapter.rank:g}")
    else:
        notes.append("full fine-tuning: every weight is trained")
    return notes
