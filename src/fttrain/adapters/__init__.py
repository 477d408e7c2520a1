"""Adapters: one entry a kind in `attach`. PEFT makes the layers; what it leaves to its callers is here."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ftlaunch.errors import UserError
from ftlaunch.recipe import Adalora, Adapter, Dora, Full, LowRank, Pissa, Rslora, Virtual
from fttrain.adapters import targets
from fttrain.hub import adapter_folder

TRAINED = "default"
"""PEFT's name for the adapter that is trained; frozen ones beside it have others."""


def attach(
    model: nn.Module, adapter: Adapter, start: Path | None, *, in_fp32: bool, accumulation: int = 1
) -> nn.Module:
    """The model with its trainable weights chosen: a new adapter, or the one in the artifact folder `start`.

    `in_fp32` holds adapters in fp32 over a base in 16 bits; DeepSpeed wants one format and keeps the fp32 copy itself.
    `accumulation` is how many backward passes make a step. Activation checkpointing comes afterwards: where it is on,
    PEFT has the whole stack computed backwards.
    Raises UserError where the targets match no layer.
    """
    if isinstance(adapter, Full):
        return model.requires_grad_(True)
    model.requires_grad_(False)
    start = None if start is None else adapter_folder(start)
    if isinstance(adapter, Virtual):
        from fttrain.adapters import virtual_tokens

        return virtual_tokens.attach(model, adapter, start, name=TRAINED, in_fp32=in_fp32)
    continued = None if isinstance(adapter, Pissa) else start  # whose saved form has another rank
    wrapped = _with_lora(model, adapter, continued, in_fp32=in_fp32)
    match adapter:
        case Dora():
            from fttrain.adapters import dora

            dora.install(wrapped, TRAINED, fresh=start is None)
        case Pissa():
            from fttrain.adapters import pissa

            pissa.install(wrapped, TRAINED, iterations=adapter.svd_iterations, start=start)
        case Adalora():
            from fttrain.adapters import adalora

            adalora.install(wrapped, TRAINED, adapter, accumulation=accumulation, fresh=start is None)
        case _:
            pass
    return wrapped


def _with_lora(model: Any, adapter: LowRank, start: Path | None, *, in_fp32: bool) -> nn.Module:
    from peft import LoraConfig, TaskType

    from fttrain.adapters import peft_files

    if start is not None:
        dropout = adapter.dropout
        wrapped = peft_files.load(model, start, TRAINED, trained=True, in_fp32=in_fp32, dropout=dropout)
    else:
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=adapter.first_rank,
            lora_alpha=adapter.alpha,  # type: ignore[arg-type]
            lora_dropout=adapter.dropout,
            target_modules=targets.names(model, adapter),
            target_parameters=_experts(model, adapter),
            use_rslora=isinstance(adapter, Rslora),
            use_dora=isinstance(adapter, Dora),
        )
        wrapped = peft_files.add(model, config, TRAINED, in_fp32=in_fp32)
    _leave_inputs_alone(wrapped)
    return wrapped


def _experts(model: nn.Module, adapter: LowRank) -> list[str] | None:
    if not adapter.experts:
        return None
    found = targets.experts(model, adapter)
    if not found:
        kind = model.config.model_type  # type: ignore[union-attr]
        raise UserError(f"adapter.experts: this {kind} model has none in the layers asked for", "remove the key")
    return found


def with_saved(model: Any, folder: Path) -> Any:
    """The model with the adapter of a folder, frozen. Raises UserError where it does not fit or cannot be trusted."""
    from peft import PeftConfig, PeftModel

    from fttrain.adapters import peft_files

    folder = adapter_folder(folder)
    if PeftConfig.from_pretrained(str(folder)).peft_type != "LORA":
        return PeftModel.from_pretrained(model, str(folder))
    return peft_files.load(model, folder, TRAINED, trained=False)


def _leave_inputs_alone(model: nn.Module) -> None:
    """Under autocast PEFT's cast of the input to fp32 is undone at once by the matrix product."""
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]


def add_frozen(model: Any, folder: Path, name: str, *, in_fp32: bool) -> None:
    """Load the adapter of an artifact folder beside the trained one, under a name of its own; it is never trained."""
    from fttrain.adapters import peft_files

    peft_files.load(model, folder, name, trained=False, in_fp32=in_fp32)
    if getattr(model.peft_config[name], "use_dora", False):
        from fttrain.adapters import dora

        dora.install(model, name, fresh=False)


def leads(model: Any) -> bool:
    """Whether virtual tokens go before the rows of this model."""
    return hasattr(model, "active_peft_config") and model.active_peft_config.is_prompt_learning


@contextmanager
def using_adapter(model: nn.Module, name: str) -> Iterator[None]:
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


def save(model: Any, adapter: Adapter, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the trained weights, whole and by their names, as plain PEFT loads them on the unchanged base."""
    if isinstance(adapter, Virtual):
        from fttrain.adapters import virtual_tokens

        virtual_tokens.save(model, TRAINED, weights, folder)
        return
    if isinstance(adapter, Pissa):
        from fttrain.adapters import pissa

        weights = pissa.as_plain_lora(model, weights, model.peft_config[TRAINED])
    if isinstance(adapter, Adalora):
        from fttrain.adapters import adalora

        weights = adalora.as_plain_lora(model, weights, model.peft_config[TRAINED])
    from fttrain.adapters import peft_files

    held = model.peft_config[TRAINED]
    model.peft_config[TRAINED] = peft_files.portable(model, TRAINED)
    # PEFT would ask the hub whether the vocabulary was resized; nothing here resizes it.
    model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False, selected_adapters=[TRAINED])
    model.peft_config[TRAINED] = held


def stateful(model: nn.Module, adapter: Adapter, num_steps: int) -> Any:
    """What checkpoints carry of the adapter besides trained weights and moments (`Carried`); None where nothing.

    AdaLoRA's is its allocator, over so many optimizer steps.
    """
    match adapter:
        case Pissa():
            from fttrain.adapters import pissa

            return pissa.Starts(model)
        case Adalora():
            from fttrain.adapters import adalora

            return adalora.RankAllocator(model, adapter, num_steps)
        case _:
            return None
