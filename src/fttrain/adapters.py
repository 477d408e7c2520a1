"""Adapters: one entry a kind in `attach`. PEFT makes the layers; what it leaves to its callers is here."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ftlaunch.errors import UserError
from ftlaunch.recipe import Adapter, Full, Lora
from fttrain.intake import adapter_folder


def attach(model: nn.Module, adapter: Adapter, start: Path | None, *, in_fp32: bool) -> nn.Module:
    """The model with its trainable weights chosen: a new adapter, or the one in the artifact folder `start`.

    `in_fp32` holds adapters in fp32 over a base in 16 bits; DeepSpeed wants one format and keeps the fp32 copy itself.
    Raises UserError where the targets match no layer.
    """
    if isinstance(adapter, Full):
        return model.requires_grad_(True)
    model.requires_grad_(False)
    return _attach_lora(model, adapter, start, in_fp32=in_fp32)


def _attach_lora(model: nn.Module, adapter: Lora, start: Path | None, *, in_fp32: bool) -> nn.Module:
    from peft import LoraConfig, PeftModel, TaskType, get_peft_model

    if start is not None:
        wrapped: Any = PeftModel.from_pretrained(
            model,  # type: ignore[arg-type]
            str(adapter_folder(start)),
            is_trainable=True,
            autocast_adapter_dtype=in_fp32,
        )
    else:
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=adapter.rank,
            lora_alpha=adapter.alpha,  # type: ignore[arg-type]
            lora_dropout=adapter.dropout,
            target_modules=adapter.targets,
        )
        try:
            wrapped = get_peft_model(model, config, autocast_adapter_dtype=in_fp32)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"adapter.targets {adapter.targets!r}: {error}", _candidates(model)) from error
    for module in wrapped.modules():
        # Under autocast PEFT's cast of the input to fp32 is undone at once by the matrix product.
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    return wrapped


def add_frozen(model: Any, folder: Path, name: str, *, in_fp32: bool) -> None:
    """Load the adapter of an artifact folder beside the trained one, under a name of its own; it is never trained."""
    model.load_adapter(str(folder), name, is_trainable=False, autocast_adapter_dtype=in_fp32)


@contextmanager
def speaking_as(model: nn.Module, name: str) -> Iterator[None]:
    """Within, the adapter of this name counts; where the model has none of that name, the bare base."""
    # PEFT's own switches would also say anew which weights are trained.
    layers = [module for module in model.modules() if hasattr(module, "_active_adapter")]
    held = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [name]  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, active in zip(layers, held, strict=True):
            layer._active_adapter = active


def _candidates(model: nn.Module) -> str:
    names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    return f'use "all-linear" or names among: {", ".join(names)}'
