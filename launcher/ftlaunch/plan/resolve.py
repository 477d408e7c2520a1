"""What counts for one stage: its own tables where it has them, else the recipe's."""

from typing import Literal

import msgspec
from msgspec import Struct

from ftlaunch.recipe.adapter import Adapter, Full, Virtual
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.noise import Noise, replaces
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.recipe.stages import Dpo, Evaluate, Merge, Optimizer, Parallel, Ppo, Reward, Stage, Training

BASE = "base"
"""What `start` calls the plain model."""


class Resolved(Struct, frozen=True):
    """The tables that a stage runs with."""

    model: Model
    adapter: Adapter
    noise: Noise
    optimizer: Optimizer
    parallel: Parallel


class ResolvedStage(Struct, frozen=True):
    """A stage of a recipe with the tables that count for it and the earlier stages that it needs."""

    index: int
    stage: Stage
    tables: Resolved
    named: tuple["ResolvedStage", ...]
    """The earlier training stages that its `start` may mean; none for "base"."""
    before: "ResolvedStage | None"
    """The training stage that it goes on from. It is the one that `start` names, else the last earlier one. PPO passes
    over reward stages: it asks them for scores, and goes on with the policy. So does an evaluation."""
    reward: "ResolvedStage | None"
    """The last earlier reward stage."""

    @property
    def begins_on_merge(self) -> bool:
        """Whether it trains on a merge of what it goes on from: only the same adapter goes on."""
        if self.before is None or not isinstance(self.stage, Training):
            return False
        return not isinstance(self.before.tables.adapter, Full) and self.before.tables.adapter != self.tables.adapter

    @property
    def replaced_activations(self) -> list[Noise]:
        """The [noise] tables that have replaced an activation function since the last base or merge, its own last."""
        earlier = [] if self.before is None or self.begins_on_merge else self.before.replaced_activations
        return earlier + [self.tables.noise] * replaces(self.tables.noise)


def resolve(recipe: Recipe) -> list[ResolvedStage]:
    """Every stage of a recipe, in order."""
    stages: list[ResolvedStage] = []
    for index, stage in enumerate(recipe.stage):
        trained = [other for other in stages if isinstance(other.stage, Training)]
        named = tuple(other for other in trained if stage.start in (other.index, other.stage.__struct_config__.tag))
        # isinstance(…, ()) is False for everything: other stages pass over none.
        passed_over = Reward if isinstance(stage, Ppo | Evaluate) else ()
        last = next((other for other in reversed(trained) if not isinstance(other.stage, passed_over)), None)
        before = last if stage.start is None else named[0] if len(named) == 1 else None
        reward = next((other for other in reversed(trained) if isinstance(other.stage, Reward)), None)
        tables = _tables(recipe, stage, None if before is None else before.tables)
        stages.append(ResolvedStage(index, stage, tables, named, before, reward))
    return stages


def _tables(recipe: Recipe, stage: Stage, before: Resolved | None) -> Resolved:
    """The tables of a stage. A merge and an evaluation have those of what they start from."""
    if isinstance(stage, Merge):
        return for_merge_of(before or recipe)
    if isinstance(stage, Evaluate):
        return _for_evaluation(recipe, stage, before)
    return Resolved(
        model=stage.model or recipe.model,
        adapter=stage.adapter or recipe.adapter,
        noise=stage.noise or recipe.noise,
        optimizer=stage.optimizer or recipe.optimizer,
        parallel=stage.parallel or recipe.parallel,
    )


def _for_evaluation(recipe: Recipe, stage: Evaluate, before: Resolved | None) -> Resolved:
    """The tables of what is evaluated, by as many processes as the recipe has: each holds all of the model."""
    alone = for_merge_of(before or recipe)
    shared = recipe.parallel
    parallel = stage.parallel or (alone.parallel if shared.strategy == "zero3" else replicas(shared))
    return msgspec.structs.replace(alone, parallel=parallel)


def replicas(parallel: Parallel) -> Parallel:
    """Return [parallel] for as many processes, none of which shares weights with another."""
    alone = parallel.world_size == 1
    return msgspec.structs.replace(parallel, strategy="single" if alone else "ddp", offload="none")


def for_merge_of(trained: Recipe | Resolved) -> Resolved:
    """The tables of a merge of what a stage has trained with these, which runs in one process."""
    parallel = Parallel(device=trained.parallel.device)
    return Resolved(trained.model, trained.adapter, trained.noise, trained.optimizer, parallel)


def reference(stage: Dpo, adapter: Adapter) -> Literal["live", "precomputed"]:
    """How a DPO stage learns what its reference says."""
    return stage.reference or ("precomputed" if isinstance(adapter, Full | Virtual) else "live")
