"""What counts for one stage: its own tables where it has them, else the recipe's."""

from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from ftlaunch.recipe import (
    Adapter,
    Dpo,
    Evaluate,
    Full,
    Merge,
    Model,
    Noise,
    Optimizer,
    Parallel,
    Ppo,
    Recipe,
    Reward,
    Training,
    Virtual,
    replaces,
)

BASE = "base"
"""What `start` calls the plain model."""


@dataclass(frozen=True)
class Resolved:
    """The tables that a stage runs with."""

    model: Model
    adapter: Adapter
    noise: Noise
    optimizer: Optimizer
    parallel: Parallel
    world_size: int
    """Processes on all nodes together."""


def for_stage(recipe: Recipe, stage: Training | Merge | Evaluate) -> Resolved:
    """The tables of a stage of this recipe. A merge has those of what it folds, and runs in one process."""
    if isinstance(stage, Merge):
        return for_merge_of(recipe, trained_before(recipe, stage))
    if isinstance(stage, Evaluate):
        return _for_evaluation(recipe, stage)
    parallel = stage.parallel or recipe.parallel
    return Resolved(
        model=stage.model or recipe.model,
        adapter=stage.adapter or recipe.adapter,
        noise=stage.noise or recipe.noise,
        optimizer=stage.optimizer or recipe.optimizer,
        parallel=parallel,
        world_size=parallel.nodes * parallel.procs_per_node,
    )


def _for_evaluation(recipe: Recipe, stage: Evaluate) -> Resolved:
    """The tables of what is evaluated, by as many processes as the recipe has: each holds all of the model."""
    alone = for_merge_of(recipe, trained_before(recipe, stage))
    shared = recipe.parallel
    parallel = stage.parallel or (alone.parallel if shared.strategy == "zero3" else replicas(shared))
    return replace(alone, parallel=parallel, world_size=parallel.world_size)


def replicas(parallel: Parallel) -> Parallel:
    """As many processes, none of which shares weights with another."""
    alone = parallel.world_size == 1
    return msgspec.structs.replace(parallel, strategy="single" if alone else "ddp", offload="none")


def for_merge_of(recipe: Recipe, trained: Training | None) -> Resolved:
    """The tables of a merge of what a stage has trained."""
    before: Recipe | Resolved = recipe if trained is None else for_stage(recipe, trained)
    device = before.parallel.device
    return Resolved(before.model, before.adapter, before.noise, before.optimizer, Parallel(device=device), world_size=1)


def trained_before(recipe: Recipe, stage: Training | Merge | Evaluate) -> Training | None:
    """The training stage that this one, which must be the recipe's own object, goes on from; None where there is none.

    It is the one that `start` names, else the last earlier one. PPO passes over reward stages: it asks them for scores,
    and goes on with the policy. So does an evaluation, which asks for answers.
    """
    if stage.start is not None:
        found = named_by_start(recipe, stage)
        return found[0] if len(found) == 1 else None
    passed_over = Reward if isinstance(stage, Ppo | Evaluate) else ()
    return next((other for other in reversed(_earlier(recipe, stage)) if not isinstance(other, passed_over)), None)


def named_by_start(recipe: Recipe, stage: Training | Merge | Evaluate) -> list[Training]:
    """The earlier training stages that a stage's `start` may mean; none for "base"."""
    earlier = _earlier(recipe, stage)
    if isinstance(stage.start, int):
        return [other for other in earlier if stage.start < len(recipe.stage) and recipe.stage[stage.start] is other]
    return [other for other in earlier if other.__struct_config__.tag == stage.start]


def replaced_activations(recipe: Recipe, stage: Training) -> list[Noise]:
    """The [noise] tables that have replaced an activation function since the last base or merge, this stage's last."""
    before, own = trained_before(recipe, stage), for_stage(recipe, stage)
    merged = before is not None and merges(for_stage(recipe, before).adapter, own.adapter)
    earlier = [] if before is None or merged else replaced_activations(recipe, before)
    return earlier + [own.noise] * replaces(own.noise)


def merges(before: Adapter, after: Adapter) -> bool:
    """Whether a stage with the one adapter begins on a merge of the other: only the same adapter goes on."""
    return not isinstance(before, Full) and before != after


def reward_before(recipe: Recipe, stage: Ppo) -> Reward | None:
    """The last reward stage before this one."""
    return next((other for other in reversed(_earlier(recipe, stage)) if isinstance(other, Reward)), None)


def _earlier(recipe: Recipe, stage: Training | Merge | Evaluate) -> list[Training]:
    place = next(index for index, other in enumerate(recipe.stage) if other is stage)
    return [other for other in recipe.stage[:place] if isinstance(other, Training)]


def reference(stage: Dpo, adapter: Adapter) -> Literal["live", "precomputed"]:
    """How a DPO stage learns what its reference says."""
    return stage.reference or ("precomputed" if isinstance(adapter, Full | Virtual) else "live")
