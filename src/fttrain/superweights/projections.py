"""The projections of a model in which spikes are looked for, and their weights by output and input channel."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ftlaunch.errors import UserError
from fttrain.adapters import targets

DOWN = re.compile(r"(?:.*\.)?(\d+)\.(?:mlp\.(?:down_proj|c_proj|dense_4h_to_h|fc2)|fc2)")
"""Names of the layer that ends an MLP: of Llama, Mistral, Gemma and Qwen, GPT-2 and GPT-Neo, GPT-NeoX, Falcon and
BLOOM, Phi and OPT."""
ATTENTION = re.compile(
    r"(?:.*\.)?(\d+)\.(?:self_attn|attn|self_attention|attention|attn\.attention)\.(?:o_proj|c_proj|dense|out_proj)"
)
"""Names of the layer that ends an attention block in these."""


@dataclass(frozen=True)
class Place:
    """One weight: layer, output channel (row) and input channel (column), as Y[row] += W[row, column] · X[column]."""

    layer: int
    row: int
    column: int


@dataclass(frozen=True)
class Projection:
    """A linear layer, whichever way round it stores its weights."""

    layer: int
    name: str
    module: Any

    @property
    def matrix(self) -> Tensor:
        """The weight as [outputs, inputs], a view: GPT-2's Conv1D stores [inputs, outputs]."""
        weight = self.module.weight.data
        return weight if isinstance(self.module, nn.Linear) else weight.T


def down_projections(model: nn.Module) -> dict[int, Projection]:
    """The layer that ends each MLP, by number. Raises UserError where the model has none of a known name."""
    found = named(model, DOWN)
    if not found:
        remedy = "super weights are looked for in mlp.down_proj, mlp.c_proj, mlp.dense_4h_to_h and fc2, not in experts"
        raise UserError("no down projection was found in this model", remedy)
    return found


def named(model: nn.Module, pattern: re.Pattern[str]) -> dict[int, Projection]:
    """Modules of the text body with a matrix of floats whose whole name matches, by the layer number in it."""
    found: dict[int, Projection] = {}
    prefix, body = targets.body_of(model)
    for name, module in ((f"{prefix}{name}", module) for name, module in body.named_modules()):
        # Weights in few bits are packed integers, in which a row and a column address nothing.
        match, weight = pattern.fullmatch(name), getattr(module, "weight", None)
        if match and isinstance(weight, Tensor) and weight.is_floating_point():
            found[int(match[1])] = Projection(int(match[1]), name, module)
    return found


def unseen(model: nn.Module) -> str:
    """Return which layers have no such projection, as a sentence; empty where all have one."""
    seen, (_, count) = down_projections(model), targets.layers_of(model)
    missed = ", ".join(str(layer) for layer in range(count) if layer not in seen)
    return f"not looked at, for experts or an MLP that is not known: layers {missed}" if missed else ""


@contextmanager
def scaled(down: dict[int, Projection], places: Sequence[Place], factor: float) -> Iterator[None]:
    """Within, these weights are multiplied by `factor`; afterwards they are what they were, to the last bit."""
    # Kept and put back, as dividing by the factor would not give the same bits, and cannot undo 0.
    held = [down[place.layer].matrix[place.row, place.column].clone() for place in places]
    with torch.no_grad():
        for place, value in zip(places, held, strict=True):
            down[place.layer].matrix[place.row, place.column] = value * factor
    try:
        yield
    finally:
        for place, value in zip(places, held, strict=True):
            down[place.layer].matrix[place.row, place.column] = value
