"""Detection: a spike in the input and in the output of the same down projection, explained by a single weight."""

import statistics
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ftlaunch.tools import SpikeLimits
from fttrain.superweights.projections import ATTENTION, Place, Projection, down_projections, named, scaled

PROMPT = "Apple Inc. is a worldwide tech company."
"""Any short text does; this is the paper's."""


@dataclass(frozen=True)
class Spike:
    """The largest values of one projection's input and output, with their channels."""

    layer: int
    module: str
    input: float
    column: int
    output: float
    row: int
    weight: float
    """W[row, column]."""
    share: float
    """weight · X[column] / Y[row], at the token of the output's spike: 1 where this product alone is the output."""

    @property
    def place(self) -> Place:
        return Place(self.layer, self.row, self.column)


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    weights: list[Spike]
    """The super weights, in the order in which they were found."""
    spikes: list[Spike]
    """Every layer of the model as it is, for the plots."""
    unexplained: list[Spike]
    """Spikes on both sides, of the last pass, that no single weight makes up."""

    @property
    def places(self) -> list[Place]:
        return [spike.place for spike in self.weights]


def find(model: Any, ids_1T: Tensor, limits: SpikeLimits) -> Found:
    """Super weights of a model, told from one forward pass over `ids_1T` [1, T] at a time; the model stays as it is.

    Each pass zeroes what it finds, so that the next one sees weaker spikes that it has hidden.
    """
    down = down_projections(model)
    first = spikes(model, ids_1T, down.values())
    current, found = first, []
    candidates: list[Spike] = []
    for _ in range(limits.passes):
        candidates = [spike for spike in spiking(current, limits) if spike.weight]
        explained = [spike for spike in candidates if spike.share >= limits.share]
        if not explained:
            break
        found += explained
        # All that were found so far are zeroed together: one super weight's output can hide the next layer's.
        with scaled(down, [spike.place for spike in found], 0.0):
            current = spikes(model, ids_1T, down.values())
    unexplained = [spike for spike in candidates if spike.share < limits.share]
    return Found(found, first, unexplained)


def attention_spikes(model: Any, ids_1T: Tensor, limits: SpikeLimits) -> list[Spike]:
    """Layers, not weights: attention output projections whose output alone spikes, as seed projects choose layers."""
    seen = spikes(model, ids_1T, named(model, ATTENTION).values())
    return [spike for spike in seen if _is_spike([other.output for other in seen], spike.output, limits)]


def spiking(layers: list[Spike], limits: SpikeLimits) -> list[Spike]:
    """Those with a spike in both input and output."""
    inputs, outputs = [one.input for one in layers], [one.output for one in layers]
    return [one for one in layers if _is_spike(inputs, one.input, limits) and _is_spike(outputs, one.output, limits)]


def _is_spike(values: list[float], value: float, limits: SpikeLimits) -> bool:
    median = statistics.median(map(abs, values))
    return abs(value) > max(limits.absolute, limits.relative * median)


@torch.no_grad()
def spikes(model: Any, ids_1T: Tensor, projections: Iterable[Projection]) -> list[Spike]:
    """The largest input and output of each projection in one forward pass."""
    seen: list[Spike] = []

    def watch(projection: Projection, _module: Any, inputs: tuple[Tensor, ...], output_1TJ: Tensor) -> None:
        seen.append(_spike(projection, inputs[0][0], output_1TJ[0]))

    with ExitStack() as hooks:
        for projection in projections:
            hooks.enter_context(projection.module.register_forward_hook(partial(watch, projection)))
        model(ids_1T.to(model.device))
    return sorted(seen, key=lambda spike: spike.layer)


def _spike(projection: Projection, input_TK: Tensor, output_TJ: Tensor) -> Spike:
    # Column and row are each found at their own token, but the share is taken at the token of the output's spike.
    token, column = divmod(int(input_TK.abs().argmax()), input_TK.shape[1])
    largest = float(input_TK[token, column])
    token, row = divmod(int(output_TJ.abs().argmax()), output_TJ.shape[1])
    output, weight = float(output_TJ[token, row]), float(projection.matrix[row, column])
    share = weight * float(input_TK[token, column]) / output if output else 0.0
    return Spike(projection.layer, projection.name, largest, column, output, row, weight, share)
