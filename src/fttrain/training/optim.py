"""Optimizers and learning-rate schedules."""

import math
import re
from collections.abc import Iterable

import torch
from torch import nn

from ftlaunch.errors import UserError
from ftlaunch.recipe.stages import Optimizer, Training

B_MATRIX = re.compile(r"\.lora_(embedding_)?B\.")
"""Pattern of names of weights to which LoRA+ gives another learning rate."""


def build(spec: Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Return AdamW over the named trainable parameters; vectors (biases, norms) are never decayed.

    The learning rate is 0 until `Schedule` sets it; a group's "times" is its factor of that rate (LoRA+).
    Raises UserError where a paged optimizer lacks a GPU.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            decay = spec.weight_decay if _dimensions(parameter) > 1 else 0.0
            times = spec.lora_plus_ratio if spec.lora_plus_ratio and B_MATRIX.search(name) else 1.0
            groups.setdefault((decay, times), []).append(parameter)
    listed = [{"params": found, "weight_decay": decay, "times": times} for (decay, times), found in groups.items()]
    options = {"lr": 0.0, "betas": spec.betas, "eps": spec.eps}
    if spec.name == "adamw":
        return torch.optim.AdamW(listed, **options)
    if spec.name.startswith("paged") and not torch.cuda.is_available():
        raise UserError(f"optimizer {spec.name} needs a GPU", 'set optimizer.name = "adamw" or "adamw_8bit"')
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW, PagedAdamW8bit

    kinds = {"adamw_8bit": AdamW8bit, "paged_adamw": PagedAdamW, "paged_adamw_8bit": PagedAdamW8bit}
    return kinds[spec.name](listed, **options)


def _dimensions(parameter: nn.Parameter) -> int:
    """Dimensions of the whole tensor, also where ZeRO-3 left an empty shard in its place."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


class Schedule:
    """Learning rate as a pure function of the optimizer step, so there is nothing to save."""

    def __init__(self, stage: Training, *, peak: float, num_steps: int) -> None:
        self._shape = stage.schedule
        self._peak = peak
        self._num_steps = num_steps
        self._warmup = stage.warmup if isinstance(stage.warmup, int) else math.ceil(stage.warmup * num_steps)

    def __call__(self, step: int) -> float:
        """Return the rate of optimizer step 1 … num_steps: a line from 0 to the peak, then the shape down towards 0."""
        if step <= self._warmup:
            return self._peak * step / self._warmup
        if self._shape == "constant":
            return self._peak
        # The first step after warm-up has progress 0, the peak; the last one is a step away from 0, so it trains too.
        progress = (step - 1 - self._warmup) / max(1, self._num_steps - self._warmup)
        return self._peak * (1 - progress if self._shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))
