"""BitNet b1.58: weights of -1, 0 and 1 times one number (arXiv 2402.17764)."""

from torch import Tensor

SMALLEST = 1e-5


def absmean(weight: Tensor) -> Tensor:
    """The scale of a matrix, a scalar: the mean of |W|."""
    return weight.abs().mean().clamp(min=SMALLEST)


def ternary(weight: Tensor, gamma: Tensor) -> Tensor:
    """-1, 0 and 1 in the shape of `weight`: RoundClip(W / gamma, -1, 1)."""
    return (weight / gamma).round().clamp(-1, 1)


def stored_scale(weight: Tensor) -> Tensor:
    """The scale to store a matrix with: the one that it has, where it is ternary already, else `absmean`."""
    sizes = weight.abs()
    largest = sizes.max()
    is_ternary = bool(((sizes == 0) | (sizes == largest)).all()) and bool(largest > 0)
    return largest if is_ternary else absmean(weight)
