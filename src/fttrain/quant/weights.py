"""One matrix of weights in few bits, with single weights that stay floats, and the bits that it takes to store."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ftlaunch.tools import CalibratorName, WeightFormat
from fttrain.quant import grid as grids
from fttrain.quant.calibrate import CALIBRATORS
from fttrain.quant.grid import Granularity, Grid, Steps
from fttrain.quant.ternary import stored_scale, ternary

Place = tuple[int, int]
"""Row (output channel) and column (input channel) of a weight."""
TERNARY = Grid(2)
DOUBLE_QUANTIZATION = 8 / 64 + 32 / (64 * 256)
"""Bits per weight that the scales of blocks of 64 take: 8 each, and one fp32 for 256 of them (arXiv 2305.14314)."""


@dataclass(frozen=True)
class Scheme:
    """How weights are quantized."""

    format: WeightFormat
    grid: Grid
    granularity: Granularity
    group_size: int
    calibrator: CalibratorName


@dataclass(frozen=True)
class Quantized:
    """A matrix [outputs, inputs] in integers."""

    codes: Tensor
    """[G, N] in int16."""
    at: Steps
    grid: Grid
    shape: tuple[int, int]
    kept_at: tuple[Place, ...] = ()
    """Weights that stay floats."""
    kept: Tensor | None = None

    def dequantized(self) -> Tensor:
        """Return [outputs, inputs] in fp32: the values of the integers, with kept weights put back."""
        weight = grids.dequantize(self.codes.float(), self.at).reshape(self.shape)
        return _put_back(weight, self.kept_at, self.kept)

    @property
    def num_bits(self) -> int:
        """Bits of codes, scales (fp32), zeros (a byte each) and kept weights with their two indices."""
        zeros = 0 if self.grid.symmetric else 8 * self.at.zero.numel()
        return self.codes.numel() * self.grid.bits + 32 * self.at.scale.numel() + zeros + (32 + 64) * len(self.kept_at)


def quantized(weight_OI: Tensor, scheme: Scheme, keep: Sequence[Place] = ()) -> Quantized:
    """Return a matrix in integers. Kept weights are left out of the ranges, so they stretch no scale."""
    rest, kept = _taken_out(weight_OI, keep)
    if scheme.format == "ternary":
        gamma = stored_scale(rest).reshape(1, 1)
        at, grid, values = Steps(gamma, torch.zeros(1, 1)), TERNARY, rest.reshape(1, -1)
        codes = ternary(values, gamma)
    else:
        grid, values = scheme.grid, grids.blocks(rest, scheme.granularity, scheme.group_size)
        at = grids.steps(*CALIBRATORS[scheme.calibrator]([values], grid), grid)
        codes = grids.quantize(values, at, grid)
    return Quantized(codes.to(torch.int16), at, grid, (weight_OI.shape[0], weight_OI.shape[1]), tuple(keep), kept)


def by_bitsandbytes(weight: Tensor, quantization: str) -> Tensor:
    """Return a weight of any shape quantized to 4 bits with double quantization, or to "int8", and dequantized."""
    import bitsandbytes.functional as bnb

    if quantization == "int8":
        codes, largest, _ = bnb.int8_vectorwise_quant(weight.half().contiguous())
        return bnb.int8_vectorwise_dequant(codes, largest)
    packed, state = bnb.quantize_4bit(weight.contiguous(), quant_type=quantization, compress_statistics=True)
    return bnb.dequantize_4bit(packed, state)


def through_blocks_of_64(weight_OI: Tensor, quant_type: str, keep: Sequence[Place] = ()) -> Tensor:
    """Return a matrix [out, in] after NF4 or FP4 in fp32, with kept weights put back."""
    rest, kept = _taken_out(weight_OI, keep)
    return _put_back(by_bitsandbytes(rest, quant_type).float(), keep, kept)


def _taken_out(weight_OI: Tensor, places: Sequence[Place]) -> tuple[Tensor, Tensor | None]:
    """Return (a copy in fp32 with 0 in these places; the weights that were there)."""
    rest = weight_OI.float().clone()
    kept = torch.stack([rest[place] for place in places]) if places else None
    for place in places:
        rest[place] = 0.0
    return rest, kept


def _put_back(weight_OI: Tensor, places: Sequence[Place], kept_K: Tensor | None) -> Tensor:
    if kept_K is not None:
        for place, value in zip(places, kept_K, strict=True):
            weight_OI[place] = value
    return weight_OI


def round_trip(weight_OI: Tensor, scheme: Scheme, keep: Sequence[Place] = ()) -> tuple[Tensor, float]:
    """Return (a matrix as quantization leaves it, in fp32; the bits that it takes in all)."""
    if scheme.format in ("nf4", "fp4"):
        bits = weight_OI.numel() * (4 + DOUBLE_QUANTIZATION) + (32 + 64) * len(keep)
        return through_blocks_of_64(weight_OI, scheme.format, keep), bits
    made = quantized(weight_OI, scheme, keep)
    return made.dequantized(), float(made.num_bits)
