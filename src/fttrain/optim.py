"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from ftlaunch.errors import UserError
from ftlaunch.recipe import Optimizer, Training


def build(spec: Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """AdamW over the named trainable parameters; vectors (biases, norms) are never decayed.

    The learning rate is 0 until `Schedule` sets it. Raises UserError where a paged form lacks a GPU.
    """
    trained = [parameter for _, parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if _dimensions(p) > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in trained if _dimensions(p) <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options = {"lr": 0.0, "betas": spec.betas, "eps": spec.eps}
    if spec.name == "adamw":
        return torch.optim.AdamW(groups, **options)
    if spec.name.startswith("paged") and not torch.cuda.is_available():
        raise UserError(f"optimizer {spec.name} needs a GPU", 'set optimizer.name = "adamw" or "adamw_8bit"')
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW, PagedAdamW8bit

    kinds = {"adamw_8bit": AdamW8bit, "paged_adamw": PagedAdamW, "paged_adamw_8bit": PagedAdamW8bit}
    return kinds[spec.name](groups, **options)


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
        """Rate of optimizer step 1 … num_steps: a line from 0 to the peak, then the shape down to 0."""
        if step <= self._warmup:
            return self._peak * step / self._warmup
        if self._shape == "constant":
            return self._peak
        progress = (step - 1 - self._warmup) / max(1, self._num_steps - self._warmup)
        return self._peak * (1 - progress if self._shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))
