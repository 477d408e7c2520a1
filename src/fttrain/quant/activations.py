"""Activations in few bits: the inputs of linear layers, rounded by observed ranges or token by token."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ftlaunch.tools import CalibratorName
from fttrain.quant import grid as grids
from fttrain.quant.calibrate import CALIBRATORS
from fttrain.quant.grid import Grid, Steps


@dataclass(frozen=True)
class Activations:
    """How the inputs of layers are quantized."""

    grid: Grid
    steps: dict[str, Steps]
    """Scale and zero of each layer, by its name. Empty: each token's own smallest and largest value give them."""


def rounded(x: Tensor, grid: Grid, at: Steps | None, keep: Sequence[int] = ()) -> Tensor:
    """Return `x` […, width] rounded to the grid, without `at` by each token's own range.

    The channels in `keep` are unchanged.
    """
    # Kept channels are set to 0 for the range: an outlier that stays exact would otherwise stretch the scale of all
    # the others, which is what it is kept for.
    width = x.shape[-1]
    lines = x.reshape(-1, width).float()
    if keep:
        lines = lines.clone()
        lines[:, list(keep)] = 0.0
    at = at or grids.steps(*lines.aminmax(dim=1), grid)
    out = grids.dequantize(grids.quantize(lines, at, grid), at).reshape(x.shape).to(x.dtype)
    if keep:
        out[..., list(keep)] = x[..., list(keep)]
    return out


def install(layers: dict[str, nn.Module], how: Activations, keep: dict[str, list[int]]) -> list[Any]:
    """Round the inputs of these layers from now on; return handles whose `remove()` ends it."""

    def on(name: str, layer: nn.Module) -> Any:
        at, kept = how.steps.get(name), keep.get(name, [])
        return layer.register_forward_pre_hook(lambda _module, inputs: (rounded(inputs[0], how.grid, at, kept),))

    return [on(name, layer) for name, layer in layers.items()]


@torch.no_grad()
def observe(
    model: Any,
    layers: dict[str, nn.Module],
    windows: list[Tensor],
    grid: Grid,
    calibrator: CalibratorName,
    keep: dict[str, Any],
) -> Activations:
    """Return the ranges of each layer's inputs over windows of text by the calibrator; each window is one batch.

    All inputs are held in memory at once, in the model's own number format.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def note(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        lines = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).cpu()
        if name in keep:
            lines = lines.clone()
            lines[:, keep[name]] = 0.0
        seen[name].append(lines.reshape(1, -1))

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(note, name)))
        for window in windows:
            model(window.to(model.device))
    # A layer's inputs are dropped as soon as its range is known: fp32 copies of all layers would not fit.
    choose = CALIBRATORS[calibrator]
    ranges = {name: choose([batch.float() for batch in seen.pop(name)], grid) for name in layers}
    return Activations(grid, {name: grids.steps(low, high, grid) for name, (low, high) in ranges.items()})
