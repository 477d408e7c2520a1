"""Adapters: a table of their kinds. PEFT makes the layers; what it leaves to its callers is in each kind's module."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ftlaunch.recipe.adapter import Adapter, Full
from fttrain.hub import adapter_folder

TRAINED = "default"
"""PEFT's name for the adapter that is trained; frozen ones have other names."""
MODULES = {
    "lora": "low_rank",
    "rslora": "low_rank",
    "dora": "dora",
    "pissa": "pissa",
    "adalora": "adalora",
    "prefix": "virtual_tokens",
    "prompt": "virtual_tokens",
    "p_tuning": "virtual_tokens",
}
"""Each kind of adapter and the module here whose `Method` knows it. "full" needs none: every weight is trained."""


def _method(adapter: Adapter, accumulation: int = 1) -> Any:
    """The `Method` of the adapter's kind, which has `attach`, `save` and `state`; only now are PEFT and it imported."""
    module = importlib.import_module(f"fttrain.adapters.{MODULES[str(adapter.__struct_config__.tag)]}")
    return module.Method(adapter, TRAINED, accumulation)


def attach(
    model: nn.Module, adapter: Adapter, start: Path | None, *, in_fp32: bool, accumulation: int = 1
) -> nn.Module:
    """Return the model with its trainable weights chosen: a new adapter, or the one in the artifact folder `start`.

    `in_fp32` holds adapters in fp32 over a base in 16 bits; DeepSpeed wants one format and keeps the fp32 copy itself.
    `accumulation` is how many backward passes make a step. Activation checkpointing comes afterwards: where it is on,
    PEFT has the whole stack computed backwards.
    Raises UserError where the targets match no layer.
    """
    if isinstance(adapter, Full):
        return model.requires_grad_(True)
    model.requires_grad_(False)
    start = None if start is None else adapter_folder(start)
    return _method(adapter, accumulation).attach(model, start, in_fp32=in_fp32)


def with_saved(model: Any, folder: Path) -> Any:
    """The model with the adapter of a folder, frozen. Raises UserError where it does not fit or cannot be trusted."""
    from peft import PeftConfig, PeftModel

    from fttrain.adapters import peft_files

    folder = adapter_folder(folder)
    if PeftConfig.from_pretrained(str(folder)).peft_type != "LORA":
        return PeftModel.from_pretrained(model, str(folder))
    return peft_files.load(model, folder, TRAINED, trained=False)


def add_frozen(model: Any, folder: Path, name: str, *, in_fp32: bool) -> None:
    """Load the adapter of an artifact folder as a second one, under a name of its own; it is never trained."""
    from fttrain.adapters import peft_files

    peft_files.load(model, folder, name, trained=False, in_fp32=in_fp32)
    if getattr(model.peft_config[name], "use_dora", False):
        from fttrain.adapters import dora

        dora.install(model, name, fresh=False)


def leads(model: Any) -> bool:
    """Return whether this model puts virtual tokens before each row."""
    return hasattr(model, "active_peft_config") and model.active_peft_config.is_prompt_learning


@contextmanager
def using_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """Within, the adapter of this name is active; if the model has none of that name, the bare base is computed."""
    # PEFT's own switches would also change which weights require gradients.
    layers = [module for module in model.modules() if hasattr(module, "_active_adapter")]
    held = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [name]  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, active in zip(layers, held, strict=True):
            layer._active_adapter = active


def save(model: Any, adapter: Adapter, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the trained weights, whole and by their names, as plain PEFT loads them on the unchanged base."""
    _method(adapter).save(model, weights, folder)


def stateful(model: nn.Module, adapter: Adapter, num_steps: int) -> Any:
    """What checkpoints of a stage with so many optimizer steps carry of the adapter, other than trained weights and
    moments (`Stateful`); None where nothing."""
    return None if isinstance(adapter, Full) else _method(adapter).state(model, num_steps)
