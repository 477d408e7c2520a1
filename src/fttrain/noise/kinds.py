"""Noise as pure functions: what each kind makes of an activation, drawing from torch's generator.

`strength` anneals: 1 is the noise as the recipe has it, 0 none.
"""

from typing import TypeAlias, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from ftlaunch.recipe.noise import (
    AlphaDropout,
    Dropout,
    DropPath,
    Gaussian,
    GaussianDropout,
    LockedDropout,
    Multiplicative,
    Noise,
    Poisson,
    Uniform,
)
from fttrain.noise.row_index import Places

Masking: TypeAlias = Dropout | GaussianDropout | LockedDropout | DropPath | AlphaDropout
"""The kinds of dropout."""


def add_noise(a: Tensor, noise: Noise, strength: float, places: Places) -> Tensor:
    """Return the activation `a` with noise of this kind.

    `a` is [B, T, D], or of any shape where the noise does not go by rows.
    """
    if isinstance(noise, Masking):
        return _dropped(a, noise, strength * noise.probability, places)
    match noise:
        case Gaussian():
            return a + strength * _unit(a, relative=noise.relative) * (noise.mean + noise.std * torch.randn_like(a))
        case Uniform():
            drawn = torch.empty_like(a).uniform_(-(3**0.5), 3**0.5)  # standard deviation 1
            return a + strength * _unit(a, relative=noise.relative) * (noise.mean + noise.std * drawn)
        case Multiplicative():
            return a * (1 + strength * (noise.mean - 1 + noise.std * torch.randn_like(a)))
        case Poisson():
            # Drawn in fp32, which holds large counts exactly; the rate is taken off so that the noise has mean 0.
            events = torch.poisson(torch.full_like(a, noise.rate, dtype=torch.float32)).to(a.dtype)
            return a + strength * noise.scale * _unit(a, relative=noise.relative) * (events - noise.rate)
        case _:
            raise AssertionError(f"add_noise has no case for {type(noise).__name__}")


def _dropped(a: Tensor, noise: Masking, p: float, places: Places) -> Tensor:
    """Return `a` [B, T, D] after a kind of dropout with probability p."""
    match noise:
        case Dropout():
            return F.dropout(a, p)
        case GaussianDropout():
            return a * (1 + (p / (1 - p)) ** 0.5 * torch.randn_like(a))
        case LockedDropout():
            return a * _mask(a, p, places, width=a.shape[-1])
        case DropPath():
            return a * _mask(a, p, places, width=1)
        case AlphaDropout():
            return F.alpha_dropout(a, p, training=True)
    assert_never(noise)


def root_mean_square(a: Tensor) -> Tensor:
    """Return the root mean square of each token's activation, [..., 1], without gradient."""
    return a.detach().float().square().mean(-1, keepdim=True).sqrt().to(a.dtype)


def _unit(a: Tensor, *, relative: bool) -> Tensor | float:
    """Return the unit of the noise at each token: its root mean square where the recipe says `relative`, else 1."""
    return root_mean_square(a) if relative else 1.0


def _mask(a: Tensor, probability: float, places: Places, *, width: int) -> Tensor:
    """Return [B, T, width]: 0 or 1 / (1 - p), drawn once for each row."""
    # In a packed line several rows share one index of B, so the mask is drawn by row number and looked up by token.
    rows_BT = places.rows_of(a)
    kept_RW = torch.empty(int(rows_BT.max()) + 1, width, device=a.device).bernoulli_(1 - probability)
    return (kept_RW / (1 - probability)).to(a.dtype)[rows_BT]
