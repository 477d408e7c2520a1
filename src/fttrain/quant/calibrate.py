"""Calibration: which range of values a block's integers should span. One function per method, all with one signature.

Each takes what was observed, a list of batches [G, N], and the grid; it returns low and high of each block, [G] both.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ftlaunch.tools import CalibratorName
from fttrain.quant.grid import Grid, dequantize, quantize, steps

Range = tuple[Tensor, Tensor]
Calibrator = Callable[[Sequence[Tensor], Grid], Range]

RATE = 0.01
"""Weight of a new batch in the moving average; torch's averaging constant."""
PERCENT = 99.9
SHRINKS = 80
"""Ranges that the search for the least squared error tries: from all of it down to a fifth."""
BINS = 2048
CANDIDATES = 96
"""Thresholds that the entropy method tries."""


def min_max(batches: Sequence[Tensor], grid: Grid) -> Range:  # noqa: ARG001 every calibrator's
    """From the smallest to the largest value seen."""
    lows, highs = zip(*(batch.aminmax(dim=1) for batch in batches), strict=True)
    return torch.stack(lows).amin(0), torch.stack(highs).amax(0)


def moving_average(batches: Sequence[Tensor], grid: Grid) -> Range:  # noqa: ARG001 every calibrator's
    """Return the exponential moving average of the batches' extremes: m ← m + 0.01 · (batch - m)."""
    low, high = batches[0].aminmax(dim=1)
    for batch in batches[1:]:
        new_low, new_high = batch.aminmax(dim=1)
        low, high = low + RATE * (new_low - low), high + RATE * (new_high - high)
    return low, high


def percentile(batches: Sequence[Tensor], grid: Grid) -> Range:  # noqa: ARG001 every calibrator's
    """From the 0.1th to the 99.9th percentile of all values, each an observed one."""
    # kthvalue counts from 1, and -int(-x) rounds up: of 1000 values the 999th is the 99.9th percentile.
    values = torch.cat(list(batches), dim=1)
    count = values.shape[1]
    above = min(count, max(1, -int(-count * PERCENT // 100)))
    return values.kthvalue(count + 1 - above, dim=1).values, values.kthvalue(above, dim=1).values


def mse(batches: Sequence[Tensor], grid: Grid) -> Range:
    """Return the range with the least squared error, of those that shrink min-max alike on both sides."""
    values = torch.cat(list(batches), dim=1)
    low, high = min_max(batches, grid)
    best_low, best_high = low, high
    # A narrower range clips outliers and rounds all others more finely: the error has one minimum and no
    # closed form, so all blocks try the same list of factors at once.
    least = torch.full_like(low, torch.inf)
    for shrink in torch.linspace(1.0, 0.2, SHRINKS).tolist():
        at = steps(low * shrink, high * shrink, grid)
        error = (dequantize(quantize(values, at, grid), at) - values).square().sum(1)
        better = error < least
        least = torch.where(better, error, least)
        best_low, best_high = (
            torch.where(better, new * shrink, best) for new, best in ((low, best_low), (high, best_high))
        )
    return best_low, best_high


def entropy(batches: Sequence[Tensor], grid: Grid) -> Range:
    """Return the range |x| ≤ T whose histogram in few levels has the least KL divergence from the fine one.

    This is TensorRT's method. Values beyond T count as T in the fine histogram.
    """
    values = torch.cat(list(batches), dim=1)
    low, high = min_max(batches, grid)
    top = torch.maximum(low.abs(), high.abs()).clamp(min=1e-12)
    fine_GB = _histogram(values.abs() / top[:, None])
    levels = 2 ** (grid.bits - 1)
    best, least = top.clone(), torch.full_like(top, torch.inf)
    for width in torch.linspace(max(levels, BINS // CANDIDATES), BINS, CANDIDATES).long().unique().tolist():
        divergence = _divergence(fine_GB, width, levels)
        better = divergence < least
        least = torch.where(better, divergence, least)
        best = torch.where(better, top * (width / BINS), best)
    return torch.maximum(low, -best), torch.minimum(high, best)


def _histogram(unit_GN: Tensor) -> Tensor:
    """[G, BINS]: counts of values from 0 to 1."""
    index = (unit_GN * BINS).long().clamp(max=BINS - 1)
    counts = torch.zeros(unit_GN.shape[0], BINS)
    return counts.scatter_add_(1, index, torch.ones_like(unit_GN, dtype=counts.dtype))


def _divergence(fine_GB: Tensor, width: int, levels: int) -> Tensor:
    """Return [G]: the KL divergence of the first `width` bins from the same mass in `levels` levels.

    Each level spreads its mass over its bins that are not empty. Empty bins stay empty in both, as in rounding.
    """
    reference = fine_GB[:, :width].clone()
    filled = (reference > 0).float()
    level_of = (torch.arange(width) * levels // width).expand_as(reference)
    mass = torch.zeros(len(fine_GB), levels).scatter_add_(1, level_of, fine_GB[:, :width])
    count = torch.zeros(len(fine_GB), levels).scatter_add_(1, level_of, filled)
    spread = (mass / count.clamp(min=1)).gather(1, level_of) * filled
    # What is clipped lands on the outermost bin of the reference, but not of the levels: that is the cost of clipping.
    reference[:, -1] += fine_GB[:, width:].sum(1)
    p = reference / reference.sum(1, keepdim=True)
    q = spread / spread.sum(1, keepdim=True).clamp(min=1e-12)
    return torch.where(p > 0, p * (p / q.clamp(min=1e-12)).log(), 0.0).sum(1)


def power_of_two(batches: Sequence[Tensor], grid: Grid) -> Range:
    """Return min-max, widened until the scale is a power of two, so that dividing by it is a shift."""
    low, high = min_max(batches, grid)
    scale = steps(low, high, grid).scale[:, 0]
    wider = torch.exp2(torch.ceil(torch.log2(scale))) / scale
    return low * wider, high * wider


CALIBRATORS: dict[CalibratorName, Calibrator] = {
    "min-max": min_max,
    "moving-average": moving_average,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
    "power-of-two": power_of_two,
}
