"""Which weights of a stage are trained, and how many elements they have."""

import re

from msgspec import Struct

from ftlaunch.plan.cost.families import Linear
from ftlaunch.plan.cost.shape import Shape
from ftlaunch.recipe.adapter import SUPER_WEIGHTS, Adalora, Adapter, Dora, Full, LowRank, Pissa, Prefix, Prompt, PTuning

MANY_LAYERS = 3
"""Layers with super weights that a model has at most, of those that were published (arXiv 2411.07191, table 2)."""


class Trained(Struct, frozen=True, kw_only=True):
    """What a stage trains of a model."""

    parameters: int
    """Elements of all trained weights."""
    layers_backward: int
    """Layers that are computed backwards: those from the lowest adapted one up."""
    adapted: tuple[Linear, ...] = ()
    """Linear layers with an adapter, in each adapted layer."""
    rank: int = 0
    turned: bool = False
    """Whether results of adapted layers are scaled column by column, as by DoRA."""
    largest: int
    """Elements of the largest trained weight."""
    head: bool = False
    """Whether the head's own weights are trained."""
    frozen: int = 0
    """Elements that are held for the adapter, and not trained."""


def of(adapter: Adapter, shape: Shape) -> Trained:
    """What an adapter trains of a model of that shape."""
    match adapter:
        case Full():
            return Trained(parameters=shape.parameters, layers_backward=shape.layers, largest=shape.largest, head=True)
        case Prefix():
            elements = adapter.virtual_tokens * shape.layers * 2 * shape.keys
            if adapter.projection:
                inner = adapter.hidden_size or shape.width
                elements = adapter.virtual_tokens * shape.width + inner * (shape.width + 2 * shape.layers * shape.keys)
            return Trained(parameters=elements, layers_backward=shape.layers, largest=elements)
        case Prompt():
            elements = adapter.virtual_tokens * shape.width
            return Trained(parameters=elements, layers_backward=shape.layers, largest=elements)
        case PTuning():
            inner = adapter.hidden_size or shape.width
            elements = adapter.virtual_tokens * shape.width + 2 * inner * shape.width + inner * inner
            return Trained(parameters=elements, layers_backward=shape.layers, largest=max(inner**2, elements // 3))
        case _:
            return _low_rank(adapter, shape)


def _low_rank(adapter: LowRank, shape: Shape) -> Trained:
    rank = adapter.first_rank
    layers = numbers(adapter.layers, shape.layers)
    adapted = tuple(linear for linear in shape.linears if _is_target(adapter.targets, linear, shape))
    in_layer = sum(rank * (linear.inputs + linear.outputs) for linear in adapted)
    if isinstance(adapter, Dora):
        in_layer += sum(linear.outputs for linear in adapted)
    if isinstance(adapter, Adalora):
        in_layer += rank * len(adapted)
    frozen = sum(linear.outputs for linear in adapted) * len(layers) if isinstance(adapter, Dora) else 0
    if isinstance(adapter, Pissa):
        frozen = in_layer * len(layers)
    if adapter.experts:
        in_layer += _experts(shape, rank)
    largest = max((rank * max(linear.inputs, linear.outputs) for linear in adapted), default=0)
    return Trained(
        parameters=in_layer * len(layers),
        layers_backward=shape.layers - min(layers, default=shape.layers),
        adapted=adapted,
        rank=rank,
        turned=isinstance(adapter, Dora),
        largest=largest,
        frozen=frozen,
    )


def _experts(shape: Shape, rank: int) -> int:
    """Elements of the adapters of a layer's experts, each with an A and a B for its two stacked matrices."""
    return shape.experts * rank * ((shape.width + 2 * shape.mlp) + (shape.mlp + shape.width))


def _is_target(targets: str | list[str], linear: Linear, shape: Shape) -> bool:
    if linear.name.endswith("gate") and shape.expert_parameters:
        return False  # it chooses experts
    if targets == "all-linear":
        return True
    if isinstance(targets, list):
        return any(linear.name == name or linear.name.endswith(f".{name}") for name in targets)
    beginnings = ("model.layers", "transformer.h")
    names = (f"{begin}.{layer}.{linear.name}" for begin in beginnings for layer in range(shape.layers))
    return any(re.fullmatch(targets, name) for name in names)


def numbers(asked: list[int] | str | None, count: int) -> list[int]:
    """Numbers of the layers that are adapted."""
    if asked is None:
        return list(range(count))
    if isinstance(asked, list):
        return [layer for layer in asked if layer < count]
    if asked == SUPER_WEIGHTS:
        return list(range(min(count, MANY_LAYERS)))  # they are among the first
    word, _, number = asked.partition(":")
    if word == "top":
        return list(range(max(0, count - int(number)), count))
    return list(range(int(number) - 1, count, int(number)))
