"""Which share of a model an adapter is on, and which share is held in few bits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import LowRank
from ftlaunch.recipe.model import LARGEST_REST
from fttrain.adapters import targets


@dataclass(frozen=True)
class Coverage:
    """Numbers of weights of the text body's matrices, without embeddings."""

    layers: int
    """Weights in adapted layers."""
    experts: int
    """Weights in stacked experts, adapted or not."""
    has_experts: bool
    """Whether the experts are adapted."""
    can_have_experts: bool
    """Whether they could be."""
    total: int
    left_out: dict[str, str]
    """Layers that no adapter can be on, and why."""

    @property
    def share(self) -> float:
        """Share of the weights that are adapted, from 0 to 1."""
        return (self.layers + self.experts * self.has_experts) / max(self.total, 1)

    def lines(self) -> Iterator[str]:
        """Yield the sentences for the user."""
        yield f"the adapter is on {self.share:.1%} of the body's weights"
        if self.experts and not self.has_experts:
            rest = self.experts / self.total
            way = "adapter.experts = true adapts them" if self.can_have_experts else "no adapter can be on them"
            yield f"experts: not adapted ({rest:.1%} of the weights); {way}"
        for reason in sorted(set(self.left_out.values())):
            names = targets.collapsed(name for name, why in self.left_out.items() if why == reason)
            yield f"not adapted: {', '.join(names)}: {reason}"


def of(model: nn.Module, adapter: LowRank) -> Coverage:
    """Return the coverage of a plain model by an adapter that is not attached yet."""
    layers = sum(_size(model.get_submodule(name)) for name in targets.names(model, adapter))
    stacked = targets.experts(model, adapter)
    experts = sum(_numel(model.get_parameter(name)) for name in stacked)
    able = not any(targets.is_read_past(model, name) for name in stacked)
    return Coverage(layers, experts, adapter.experts, able, _in_all(model), targets.left_out(model, adapter))


def require_few_bits(model: nn.Module, quantization: str) -> str:
    """Return how much of the body is held in few bits, as a sentence. Raises UserError where that is too little."""
    held = sum(_size(module) for module in _layers(model) if type(module).__name__ in targets.QUANTIZED)
    remedy = 'write quantization = "none"; zero3, or offload = "cpu" with it, shares out what does not fit'
    share = require_reach(model, held, f"model.quantization = {quantization!r}", remedy)
    return f"{quantization}: {share:.1%} of the body's weights are in few bits"


def require_reach(model: nn.Module, held: int, what: str, remedy: str) -> float:
    """Return the share of the body's weights that `held` of them are. Raises UserError where it is too small."""
    share = held / max(_in_all(model), 1)
    if 1 - share > LARGEST_REST:
        why = ", as linear layers are quantized and no stacked experts" if targets.experts(model, LowRank()) else ""
        raise UserError(f"{what} would leave {1 - share:.0%} of the body's weights in 16 bits{why}", remedy)
    return share


def _in_all(model: nn.Module) -> int:
    _, body = targets.body_of(model)
    inside = {id(p) for module in _layers(model) for p in module.parameters(recurse=False)}
    embedded = {id(p) for m in body.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    bare = [p for p in body.parameters() if id(p) not in inside | embedded and _dims(p) >= 2]
    return sum(map(_size, _layers(model))) + sum(map(_numel, bare))


def _layers(model: nn.Module) -> list[Any]:
    _, body = targets.body_of(model)
    return [module for module in body.modules() if isinstance(module, targets.LINEAR)]


def _size(layer: Any) -> int:
    """Weights of a layer, also where several are packed into a byte."""
    if type(layer).__name__ in targets.QUANTIZED:
        return layer.in_features * layer.out_features
    return _numel(layer.weight)


def _numel(parameter: Any) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _dims(parameter: Any) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))
