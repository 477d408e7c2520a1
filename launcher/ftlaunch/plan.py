"""Recipe → Plan: what will be started, with which files, in which order. Pure: nothing is written or looked up."""

import hashlib
from pathlib import Path

import msgspec
from msgspec import Struct

from ftlaunch import node, resolve
from ftlaunch.recipe import (
    Adapter,
    Dpo,
    Full,
    Lora,
    Merge,
    Orpo,
    Pairwise,
    Ppo,
    Recipe,
    Reward,
    Sft,
    Stage,
    Training,
)
from ftlaunch.rundir import Step

LEARNING_RATE: dict[type[Training], dict[type[Adapter], float]] = {
    Sft: {Lora: 2e-4, Full: 2e-5},
    Reward: {Lora: 1e-4, Full: 1e-5},
    Dpo: {Lora: 1e-5, Full: 1e-6},
    Orpo: {Lora: 8e-5, Full: 8e-6},
    Ppo: {Lora: 3e-5, Full: 3e-6},
}
"""Peak learning rates that suit each kind of stage and of adapter when the recipe names none."""


BESIDE = (
    "parallel",
    "micro_batch_size",
    "activation_checkpointing",
    "save_every",
    "keep",
    "on_save_failure",
    "on_nonfinite",
    "generation_batch_size",
    "samples_every",
)
"""Keys that a run may change on its way: how the work is shared out, and what is done beside or in trouble."""


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
    notes: dict[str, str]
    """What the stage does, derived values included: a line each, under a label such as "learning rate"."""


class Plan(Struct, frozen=True, kw_only=True):
    """A whole run, ready to start. What is printed is what is submitted."""

    name: str
    run_dir: str
    recipe: Recipe
    steps: list[PlannedStep]


def make_plan(recipe: Recipe, run_dir: Path) -> Plan:
    """Plan a recipe that has passed `rules.check`. `run_dir` is where the run will be, made absolute."""
    fingerprint = training_hash(recipe)
    names = [f"{index:02d}-{_kind(stage)}" for index, stage in enumerate(recipe.stage, start=1)]
    steps = [
        _plan_step(name, _make_step(recipe, stage, names, fingerprint))
        for name, stage in zip(names, recipe.stage, strict=True)
    ]
    return Plan(name=recipe.name, run_dir=str(run_dir.absolute()), recipe=recipe, steps=steps)


def training_hash(recipe: Recipe) -> str:
    """SHA-256 of what decides the course of training: all of a recipe but its `[parallel]` and the keys of BESIDE."""
    read_back = msgspec.json.decode(
        msgspec.json.encode(recipe), type=Recipe
    )  # in which 16 is 16.0 where floats are due
    course = msgspec.to_builtins(read_back)
    for table in (course, *course["stage"]):
        for key in BESIDE:
            table.pop(key, None)
    return hashlib.sha256(msgspec.json.encode(course, order="sorted")).hexdigest()


def _kind(stage: Training | Merge) -> str:
    return str(stage.__struct_config__.tag)


def _artifact(recipe: Recipe, of: Training | None, names: list[str]) -> str | None:
    """Where a stage leaves its artifact, relative to the run folder."""
    return next((f"{name}/artifact" for name, stage in zip(names, recipe.stage, strict=True) if stage is of), None)


def _make_step(recipe: Recipe, stage: Stage, names: list[str], fingerprint: str) -> Step:
    resolved = resolve.for_stage(recipe, stage)
    micro, accumulation, learning_rate, data = 1, 1, 0.0, {}
    if isinstance(stage, Training):
        micro = stage.micro_batch_size or stage.batch_size // resolved.world_size
        accumulation = stage.batch_size // (micro * resolved.world_size)
        learning_rate = stage.learning_rate or LEARNING_RATE[type(stage)][type(resolved.adapter)]
        tables = [stage.data] if isinstance(stage.data, str) else stage.data
        data = {table: recipe.data[table] for table in tables}
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
        start=_artifact(recipe, resolve.trained_before(recipe, stage), names),
        reward=_artifact(recipe, resolve.reward_before(recipe, stage), names) if isinstance(stage, Ppo) else None,
        training_hash=fingerprint,
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
        notes=_merge_notes(step) if isinstance(step.stage, Merge) else _training_notes(step, step.stage),
    )


def _merge_notes(step: Step) -> dict[str, str]:
    return {"merge": f"folds {step.start} into its base and compares the result with the adapter model"}


def _training_notes(step: Step, stage: Training) -> dict[str, str]:
    rows = "pairs" if isinstance(stage, Pairwise) else "rows"
    return {
        "model": _model_note(step),
        "adapter": _adapter_note(step),
        "data": ", ".join(f"{name} ({data.path})" for name, data in step.data.items()),
        **_objective_notes(step, stage),
        "length": _length_note(stage),
        "batch": f"{stage.batch_size} {rows} = {step.micro_batch_size} a micro-batch × {step.accumulation} accumulated"
        f" × {step.world_size} process{'es' if step.world_size > 1 else ''}",
        "learning rate": _learning_rate_note(step, stage),
    }


def _objective_notes(step: Step, stage: Training) -> dict[str, str]:
    match stage:
        case Reward():
            goes_on = (step.start or "").startswith("reward/", 3)
            return {
                "head": f"one number at an answer's last token, {f'going on from {step.start}' if goes_on else 'new'}"
            }
        case Dpo():
            rest = f", {stage.sft_weight:g} × SFT" if stage.sft_weight else ""
            return {"loss": f"{stage.loss}, beta {stage.beta:g}{rest}", "reference": _reference_note(step, stage)}
        case Ppo():
            return _ppo_notes(step, stage)
        case Orpo():
            return {"loss": f"cross-entropy of the chosen answer, {stage.beta:g} × odds ratio; no reference"}
        case _:
            return {}


def _ppo_notes(step: Step, stage: Ppo) -> dict[str, str]:
    size = stage.rollout_size or stage.batch_size
    batches, reward = size // stage.batch_size, stage.reward_function or stage.reward_model or step.reward
    inner = f"{stage.ppo_epochs} times over them in {batches} mini-batch{'es' if batches > 1 else ''}"
    steered = "" if stage.kl_target is None else f", steered towards {stage.kl_target:g} nats an answer"
    start = step.start or "the base"
    is_full = isinstance(step.adapter, Full)
    copy = "a frozen copy of all weights, beside them in memory" if is_full else "no second model is loaded"
    return {
        "rollout": f"{size} answers of at most {stage.max_new_tokens} tokens at temperature {stage.temperature:g}, then"
        f" {inner}: {batches * stage.ppo_epochs} optimizer steps",
        "reward": f"{'function' if stage.reward_function else 'model'} {reward}",
        "KL": f"{stage.kl_estimator}, coefficient {stage.kl_coefficient:g}{steered}",
        "reference": f"{start} as it is at the start; {copy}",
        "value": "a new head on the policy's own hidden states; dropout is off",
    }


def _reference_note(step: Step, stage: Dpo) -> str:
    start = step.start or "the base"
    if resolve.reference(stage, step.adapter) == "precomputed":
        return f"{start}, asked for all pairs before the first step; its answers are kept on disk"
    return f"{start} as it is at the start, asked at each step; no second model is loaded"


def _model_note(step: Step) -> str:
    held = f"{step.model.dtype}, weights held in {step.model.quantization}"
    note = f"{step.model.path} in {held if step.model.quantization != 'none' else step.model.dtype}"
    return f"{note}, going on from {step.start}" if step.start else note


def _adapter_note(step: Step) -> str:
    adapter = step.adapter
    if isinstance(adapter, Full):
        return "none: every weight is trained"
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    return f"LoRA of rank {adapter.rank} on {targets}, scale alpha / rank = {adapter.alpha / adapter.rank:g}"


def _length_note(stage: Training) -> str:
    if stage.steps is not None:
        return f"{stage.steps} optimizer step{'s' if stage.steps > 1 else ''}"
    if stage.epochs is None:
        return "1 epoch, as neither epochs nor steps is given"
    return f"{stage.epochs:g} epoch{'s' if stage.epochs != 1 else ''}"


def _learning_rate_note(step: Step, stage: Training) -> str:
    note = f"{step.learning_rate:g}"
    if stage.learning_rate is None:
        note += f" (none is given; this suits {_kind(stage)} with {step.adapter.__struct_config__.tag})"
    warmup = f"{stage.warmup} steps" if isinstance(stage.warmup, int) else f"{stage.warmup:.3g} of all steps"
    return f"{note}, {stage.schedule}{f' after a warm-up of {warmup}' if stage.warmup else ''}"
