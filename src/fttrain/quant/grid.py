"""Uniform quantization: x ≈ scale · (q - zero), with q an integer of a few bits (Jacob et al., arXiv 1712.05877)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ftlaunch.errors import UserError

Granularity = Literal["tensor", "channel", "group", "token"]
"""What shares one scale: everything, an output channel, `group_size` weights of one, or a token's activations."""
SMALLEST_SCALE = 1e-12


@dataclass(frozen=True)
class Grid:
    """The integers that values are rounded to."""

    bits: int
    symmetric: bool = True
    """Zero stands for zero and the integers are signed; otherwise they are unsigned and `zero` is one of them."""

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1


@dataclass(frozen=True)
class Steps:
    """Scale and zero point of each block, [G, 1] both."""

    scale: Tensor
    zero: Tensor


def steps(low_G: Tensor, high_G: Tensor, grid: Grid) -> Steps:
    """Return scale and zero of blocks whose values lie in [low, high].

    Symmetric: max(|low|, |high|) / (2^(b-1) - 1). Asymmetric: (high - low) / (2^b - 1), with 0 always in between, so
    that 0 is represented exactly.
    """
    if grid.symmetric:
        scale = torch.maximum(low_G.abs(), high_G.abs()) / grid.highest
        scale = scale.clamp(min=SMALLEST_SCALE)
        return Steps(scale[:, None], torch.zeros_like(scale)[:, None])
    low_G, high_G = low_G.clamp(max=0), high_G.clamp(min=0)
    scale = ((high_G - low_G) / grid.highest).clamp(min=SMALLEST_SCALE)
    zero = (-low_G / scale).round().clamp(grid.lowest, grid.highest)
    return Steps(scale[:, None], zero[:, None])


def quantize(x_GN: Tensor, at: Steps, grid: Grid) -> Tensor:
    """Return [G, N]: the integers, as floats. Halves round to even."""
    return ((x_GN / at.scale).round() + at.zero).clamp(grid.lowest, grid.highest)


def dequantize(codes_GN: Tensor, at: Steps) -> Tensor:
    """Return [G, N]: the values that the integers stand for."""
    return (codes_GN - at.zero) * at.scale


def blocks(x: Tensor, granularity: Granularity, group_size: int) -> Tensor:
    """Return `x` [outputs, inputs], or [tokens, width] of activations, as [G, N] with one scale per line.

    Raises UserError where groups do not divide the inputs.
    """
    if granularity == "tensor":
        return x.reshape(1, -1)
    if granularity == "group":
        if x.shape[-1] % group_size:
            message = f"groups of {group_size} weights do not divide a layer's {x.shape[-1]} inputs"
            raise UserError(message, "name a group size that does, or granularity channel")
        return x.reshape(-1, group_size)
    return x.reshape(-1, x.shape[-1])
