"""Activation functions by the names that a recipe has for them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ftlaunch.recipe.noise import Noise, Saturated

HALF_NORMAL_MEAN = math.sqrt(2 / math.pi)


class Golu(nn.Module):
    """Gompertz linear unit, x·exp(-exp(-x)) (arXiv 2502.03654)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.exp(-torch.exp(-x))


class HardSigmoid(nn.Module):
    """x / 4 + ½ within 0 and 1; torch's own has the slope 1 / 6."""

    def forward(self, x: Tensor) -> Tensor:
        return (x / 4 + 0.5).clamp(0, 1)


class NoisyWhereSaturated(nn.Module):
    """Gulcehre's function (arXiv 1603.00391, eq. 11 to 13): see the recipe's [noise] of kind "saturated"."""

    def __init__(self, noise: Saturated) -> None:
        super().__init__()
        self._noise = noise
        self._hard = BY_NAME[noise.activation]()

    def forward(self, x: Tensor) -> Tensor:
        noise = self._noise
        hard = self._hard(x)
        linear = x if noise.activation == "hard_tanh" else x / 4 + 0.5
        spread = noise.std * (torch.sigmoid(noise.sharpness * (hard - linear)) - 0.5) ** 2
        # d(x) = -sgn(x)·sgn(1 - α), written out for α above and below 1.
        direction = torch.sign(x) * (1.0 if noise.alpha > 1 else -1.0)
        return noise.alpha * hard + (1 - noise.alpha) * linear + direction * spread * self._draw(x)

    def _draw(self, x: Tensor) -> Tensor | float:
        """Return ξ in training and its mean in evaluation, so that evaluation has no randomness and no bias."""
        is_half = self._noise.draw == "half-normal"
        if not self.training:
            return HALF_NORMAL_MEAN if is_half else 0.0
        drawn = torch.randn_like(x)
        return drawn.abs() if is_half else drawn


BY_NAME: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "softplus": nn.Softplus,
    "leaky_relu": nn.LeakyReLU,
    "prelu": lambda: nn.LeakyReLU(0.25),
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "golu": Golu,
    "hard_tanh": nn.Hardtanh,
    "hard_sigmoid": HardSigmoid,
}


def make(table: Noise) -> nn.Module:
    """Return the activation function that a [noise] table puts in the place of others."""
    return NoisyWhereSaturated(table) if isinstance(table, Saturated) else BY_NAME[table.activation]()


def classes() -> tuple[type[nn.Module], ...]:
    """Return the classes of modules that are activation functions: transformers' and those above."""
    from transformers.activations import ACT2CLS

    # ACT2CLS holds classes, and (class, arguments) for variants such as gelu_10.
    theirs = [entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()]
    return *theirs, *(type(kind()) for kind in BY_NAME.values()), NoisyWhereSaturated
