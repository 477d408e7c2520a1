"""Noise on embeddings: NEFTune and SymNoise."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fttrain.noise.row_index import Places


def add(embedding: nn.Module, places: Places, *, alpha: float, kind: Literal["uniform", "sign"]) -> None:
    """Add uniform noise in ±alpha / √(row length · D) to each embedding in training (NEFTune, arXiv 2310.05914).

    "sign" draws the ends of that range instead (SymNoise, arXiv 2312.01523).
    """

    def add_noise(module: nn.Module, _inputs: Any, embedded_BTD: Tensor) -> Tensor:
        if not module.training:
            return embedded_BTD
        scale_BT = alpha / (places.lengths_BT * embedded_BTD.shape[-1]).sqrt()
        noise = torch.empty_like(embedded_BTD).uniform_(-1, 1)
        drawn = noise if kind == "uniform" else noise.sign()
        return embedded_BTD + drawn * scale_BT[..., None].to(noise.dtype)

    embedding.register_forward_hook(add_noise)
