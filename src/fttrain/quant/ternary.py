"""BitNet b1.58: weights of -1, 0 and 1 times one number (arXiv 2402.17764)."""

from torch import Tensor

SMALLEST = 1e-5


def absmean(weight_OI: Tensor) -> Tensor:
    """Return the scale of a matrix, a scalar: the mean of |W|."""
    return weight_OI.abs().mean().clamp(min=SMALLEST)


def ternary(weight: Tensor, gamma: Tensor) -> Tensor:
    """Return -1, 0 and 1 in the shape of `weight`: RoundClip(W / gamma, -1, 1)."""
    return (weight / gamma).round().clamp(-1, 1)


def stored_scale(weight_OI: Tensor) -> Tensor:
    """Return the scale to store a matrix with: its own if it is ternary already, else `absmean`."""
    # A ternary matrix has the mean |W| of its zeros too: absmean of it would be smaller, and rounding not idempotent.
    sizes = weight_OI.abs()
    largest = sizes.max()
    is_ternary = bool(((sizes == 0) | (sizes == largest)).all()) and bool(largest > 0)
    return largest if is_ternary else absmean(weight_OI)
