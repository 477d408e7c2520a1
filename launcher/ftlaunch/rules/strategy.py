"""`parallel.strategy = "auto"`: the cheapest way to share a model out that fits this machine, chosen once for a run."""

from collections.abc import Callable

import msgspec
from msgspec import Struct

from ftlaunch.errors import Problem, RecipeError
from ftlaunch.load import Loaded
from ftlaunch.plan import machine
from ftlaunch.plan.cost import costs, devices, memory, shape, words
from ftlaunch.plan.cost.devices import Device
from ftlaunch.plan.machine import Machine
from ftlaunch.plan.plan import make_specs
from ftlaunch.recipe.stages import Parallel, Stage, Strategy, Training
from ftlaunch.run.spec import StageSpec

AUTO = "auto"
BY_PRICE: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3")
"""What costs least time first: each shares out more than the one before, and so talks more between processes."""
KEY = ("parallel", "strategy")


class TooLarge(Struct, frozen=True):
    """A stage for which this machine has not the memory."""

    name: str
    spec: StageSpec
    device: Device
    size: int
    """Bytes of an element that it computes with."""
    needed: int


Find = Callable[[Loaded], list[Problem]]
"""What tells the problems of a recipe."""


def settled(loaded: Loaded, find_problems: Find) -> Loaded:
    """The recipe with "auto" replaced by what fits this machine, and why as a remark.

    Raises RecipeError where nobody can tell what fits, or nothing does.
    """
    if problems := find_problems(_with(loaded, BY_PRICE[0])):
        raise RecipeError(problems)
    here = machine.look()
    said: list[str] = []
    largest: TooLarge | None = None
    for strategy in BY_PRICE:
        chosen = _with(loaded, strategy)
        if find_problems(chosen):
            said.append(f"{strategy}: it does not go with the rest")
            continue
        found = _too_large(chosen, loaded, here)
        if found is None:
            why = f"; {', '.join(said)}" if said else ", the fastest that fits"
            used = ", ".join(sorted({parallel.strategy for parallel in chosen.recipe.parallel_tables}))
            remark = f"parallel.strategy: {used} (auto){why}"
            return msgspec.structs.replace(chosen, remarks=(*loaded.remarks, remark), is_for_here=True)
        largest = found
        needs = f"{found.name} needs {words.amount(found.needed)} of {words.amount(found.device.memory or 0)}"
        said.append(f"{found.spec.parallel.strategy}: {needs}")
    assert largest is not None  # the first strategy has no problem, so it has been counted
    message = f'"auto" finds none that fits: {"; ".join(dict.fromkeys(said))}'
    raise RecipeError([loaded.problem(KEY, message, _ways_out(largest, loaded, find_problems, here))])


def _ways_out(found: TooLarge, loaded: Loaded, find_problems: Find, here: Machine) -> str:
    """What the last stage that did not fit, as it was last counted, may be changed by; the plan tells the same."""
    told = costs.of_spec(found.spec, found.device, found.size)
    assert not isinstance(told, str)
    assert told.misfit is not None
    ways = [words.way(way) for way in told.misfit.ways]
    parallel, count = loaded.recipe.parallel, len(here.gpus)
    if parallel.device != "cpu" and parallel.procs_per_node < count:
        wider = msgspec.structs.replace(parallel, procs_per_node=count)
        more = msgspec.structs.replace(loaded, recipe=msgspec.structs.replace(loaded.recipe, parallel=wider))
        shared = [_with(more, strategy) for strategy in BY_PRICE]
        if any(not find_problems(one) and _too_large(one, more, here) is None for one in shared):
            ways.insert(0, f"parallel.procs_per_node = {count}, all GPUs that are here, which fits")
    return f"write for {found.name} one of: {'; '.join(ways)}" if ways else "take a smaller model or a larger machine"


def require_here(loaded: Loaded) -> None:
    """Raise RecipeError where "auto" was settled by this machine, of a recipe that is to run on others."""
    if loaded.is_for_here:
        remedy = f"write one of {', '.join(BY_PRICE)}: `ftlaunch plan` with the same --cluster shows what each needs"
        raise RecipeError([loaded.problem(KEY, '"auto" goes by this machine, not by the nodes of a cluster', remedy)])


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
    return msgspec.structs.replace(loaded, recipe=changed)


def _too_large(chosen: Loaded, loaded: Loaded, here: Machine) -> TooLarge | None:
    """The first stage that does not fit; None where all do. Raises RecipeError where nothing tells."""
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
            return TooLarge(name, spec, device, size, needed)
    return None
