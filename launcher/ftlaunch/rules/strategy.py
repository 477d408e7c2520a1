"""`parallel.strategy = "auto"`: the cheapest way to share a model out that fits this machine, chosen once for a run."""

import dataclasses
from collections.abc import Callable

import msgspec

from ftlaunch.errors import Problem, RecipeError
from ftlaunch.load import Loaded
from ftlaunch.plan import machine
from ftlaunch.plan.cost import costs, devices, memory, shape, words
from ftlaunch.plan.machine import Machine
from ftlaunch.plan.plan import make_specs
from ftlaunch.recipe import Parallel, Recipe, Stage, Training
from ftlaunch.recipe.stages import Strategy

AUTO = "auto"
BY_PRICE: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3")
"""What costs least time first: each shares out more than the one before, and so talks more between processes."""
KEY = ("parallel", "strategy")


def settled(loaded: Loaded, find_problems: Callable[[Loaded], list[Problem]]) -> Loaded:
    """The recipe with "auto" replaced by what fits this machine, and why as a remark.

    Raises RecipeError where nobody can tell what fits, or nothing does.
    """
    if problems := find_problems(_with(loaded, BY_PRICE[0])):
        raise RecipeError(problems)
    here = machine.look()
    said: list[str] = []
    for strategy in BY_PRICE:
        chosen = _with(loaded, strategy)
        misfit = "it does not go with the rest" if find_problems(chosen) else _misfit(chosen, loaded, here)
        if misfit is None:
            why = f"; {', '.join(said)}" if said else ", the fastest that fits"
            used = ", ".join(sorted({parallel.strategy for parallel in _tables(chosen.recipe)}))
            remark = f"parallel.strategy: {used} (auto){why}"
            return dataclasses.replace(chosen, remarks=(*loaded.remarks, remark), is_for_here=True)
        said.append(f"{strategy}: {misfit}")
    remedy = "write one of them, and see by `ftlaunch plan` what else can be done"
    raise RecipeError([loaded.problem(KEY, f'"auto" finds none that fits: {"; ".join(said)}', remedy)])


def require_here(loaded: Loaded) -> None:
    """Raise RecipeError where "auto" was settled by this machine, of a recipe that is to run on others."""
    if loaded.is_for_here:
        remedy = f"write one of {', '.join(BY_PRICE)}: `ftlaunch plan` with the same --cluster shows what each needs"
        raise RecipeError([loaded.problem(KEY, '"auto" goes by this machine, not by the nodes of a cluster', remedy)])


def _tables(recipe: Recipe) -> list[Parallel]:
    own = [getattr(stage, "parallel", None) for stage in recipe.stage]
    return [recipe.parallel, *(table for table in own if table is not None)]


def _with(loaded: Loaded, strategy: Strategy) -> Loaded:
    """The recipe with that strategy where it says "auto"; one process shares nothing out."""

    def table(parallel: Parallel) -> Parallel:
        if parallel.strategy != AUTO:
            return parallel
        return msgspec.structs.replace(parallel, strategy="single" if parallel.world_size == 1 else strategy)

    def stage(one: Stage) -> Stage:
        own = getattr(one, "parallel", None)
        return one if own is None else msgspec.structs.replace(one, parallel=table(own))

    recipe = loaded.recipe
    stages = [stage(one) for one in recipe.stage]
    changed = msgspec.structs.replace(recipe, parallel=table(recipe.parallel), stage=stages)
    return dataclasses.replace(loaded, recipe=changed)


def _misfit(chosen: Loaded, loaded: Loaded, here: Machine) -> str | None:
    """Why a stage does not fit; None where all do. Raises RecipeError where nothing tells."""
    for name, spec in make_specs(chosen.recipe).items():
        if not isinstance(spec.stage, Training):
            continue
        device, found = devices.here(here, spec.parallel), shape.read(spec.model.path)
        if device.memory is None or found is None:
            missing = f"the sizes of {spec.model.path}" if found is None else f"the memory of {device.name}"
            message = f'"auto" cannot tell what fits {name}: {missing} is not known here'
            raise RecipeError([loaded.problem(KEY, message, f"write one of: {', '.join(('single', *BY_PRICE))}")])
        size = costs.SIZES[costs.settled(spec.model.dtype, here, device)]
        needed = memory.of_stage(spec, found, size, cuda=device.cuda).needed
        if needed > device.memory:
            return f"{name} needs {words.amount(needed)} of {words.amount(device.memory)}"
    return None
