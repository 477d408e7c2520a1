"""Rules of adapters: what their keys ask of each other, of the model and of the other tables."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ftlaunch.errors import Problem
from ftlaunch.load.messages import as_toml, join_or
from ftlaunch.plan import family
from ftlaunch.recipe.adapter import SUPER_WEIGHTS, Adalora, LowRank, Prompt
from ftlaunch.recipe.model import LARGEST_REST
from ftlaunch.rules.compatibility.axes import PLAIN
from ftlaunch.rules.stage import TrainedStage, names_modules

if TYPE_CHECKING:
    from ftlaunch.plan.cost.body import Body


def targets_compile(training: TrainedStage) -> Iterator[Problem]:
    if isinstance(training.resolved.adapter, LowRank):
        yield from names_modules(training, "adapter", "targets", "all-linear")


def layers_are_there(training: TrainedStage) -> Iterator[Problem]:
    """A folder's config tells how many layers there are; with a hub id the trainer looks."""
    adapter = training.resolved.adapter
    if not isinstance(adapter, LowRank) or adapter.layers is None:
        return
    count = family.layer_count(Path(training.resolved.model.path))
    if isinstance(adapter.layers, list):
        wrong = [number for number in adapter.layers if count is not None and number >= count]
        if not adapter.layers:
            yield training.table_problem("adapter", "layers", "names no layer", "remove it, which adapts all layers")
        elif wrong:
            message = f"names layer {wrong[0]}, and the model has {count}, counted from 0"
            yield training.table_problem("adapter", "layers", message, f"name layers from 0 to {(count or 0) - 1}")
    # What the vocabulary lets through otherwise is of the form "top:8" or "every:4".
    elif count is not None and adapter.layers != SUPER_WEIGHTS and int(adapter.layers.partition(":")[2]) > count:
        remedy = f"write a number up to {count}, or remove it"
        yield training.table_problem("adapter", "layers", f"asks for more layers than the model's {count}", remedy)


def ranks_fall(training: TrainedStage) -> Iterator[Problem]:
    adapter = training.resolved.adapter
    if not isinstance(adapter, Adalora):
        return
    if adapter.first_rank < adapter.rank:
        message = f"{adapter.first_rank} is less than rank = {adapter.rank}, to which it is to be pruned"
        yield training.table_problem("adapter", "initial_rank", message, "write a larger one, or remove it")
    # With equal shares there is no step at which a rank could be taken away.
    if adapter.prune_until <= adapter.prune_after:
        message = f"{adapter.prune_until:g} is no later than prune_after = {adapter.prune_after:g}"
        yield training.table_problem("adapter", "prune_until", message, "write a larger share of the steps")


def init_has_its_text(training: TrainedStage) -> Iterator[Problem]:
    adapter = training.resolved.adapter
    if isinstance(adapter, Prompt) and (adapter.init == "text") != (adapter.text is not None):
        if adapter.text is None:
            yield training.table_problem("adapter", "init", "needs a text, and there is none", 'add text = "…"')
        else:
            message = f'counts only for init = "text", and this is {as_toml(adapter.init)}'
            yield training.table_problem("adapter", "text", message, 'remove it, or write init = "text"')


def experts_are_plain(training: TrainedStage) -> Iterator[Problem]:
    """Stacked experts take a plain low-rank product only."""
    adapter = training.resolved.adapter
    if not isinstance(adapter, LowRank) or not adapter.experts:
        return
    if not adapter.is_plain:
        message = f"{as_toml(adapter.__struct_config__.tag)} has no form for stacked experts"
        yield training.table_problem(
            "adapter", "experts", message, f"write kind = {join_or(map(as_toml, PLAIN))}, or remove it"
        )
    if adapter.dropout:
        message = "does not go with dropout, which stacked experts have no place for"
        yield training.table_problem("adapter", "experts", message, "write dropout = 0, or remove it")
    counted = _body_of(training.resolved.model.path)
    if counted is not None and not counted.experts:
        yield training.table_problem("adapter", "experts", "asks for experts, and the model has none", "remove it")
    if (name := family.name(Path(training.resolved.model.path))) in family.READ_PAST:
        message = f"does not go with {name}, whose code reads the weights of experts past an adapter"
        yield training.table_problem("adapter", "experts", message, "remove it, or train in full: leave [adapter] out")
    if training.resolved.model.rounding:
        message = "does not go with training through rounding, which leaves experts as they are"
        yield training.table_problem("adapter", "experts", message, "remove it, or the [model] quantization table")


def few_bits_reach_the_weights(training: TrainedStage) -> Iterator[Problem]:
    """bitsandbytes quantizes linear layers; a model whose weights are in stacked experts would stay in 16 bits."""
    model = training.resolved.model
    counted = _body_of(model.path) if model.is_quantized else None
    if counted is None or counted.expert_share <= LARGEST_REST:
        return
    kind, share = as_toml(model.quantization), counted.expert_share
    message = f"{kind} would leave the experts in 16 bits, which are {share:.0%} of the body's weights"
    remedy = 'write quantization = "none"; zero3, or offload = "cpu" with it, shares out what does not fit'
    yield training.table_problem("model", "quantization", message, remedy)


def _body_of(path: str) -> "Body | None":
    from ftlaunch.plan.cost import body  # few recipes ask for experts or few bits

    return body.read(path)


RULES: tuple[Callable[[TrainedStage], Iterator[Problem]], ...] = (
    targets_compile,
    layers_are_there,
    ranks_fall,
    init_has_its_text,
    experts_are_plain,
    few_bits_reach_the_weights,
)
