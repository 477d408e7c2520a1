"""Making, saving and loading low-rank adapters with PEFT, on exactly the layers that the recipe names.

For some families PEFT takes every target named gate_proj, up_proj or down_proj for experts of an older transformers,
even a dense or shared layer: it would skip that layer and adapt the experts instead. This module prevents that. In an
artifact such layers stand under `target_parameters`, as their weights, so plain PEFT computes the same.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from ftlaunch.errors import UserError
from fttrain.adapters import targets
from fttrain.hub import adapter_folder

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def add(model: Any, config: LoraConfig, name: str, *, in_fp32: bool) -> Any:
    """Return the model in PEFT's wrapper, with a new adapter of that name on exactly the targets of the config."""
    with _targets_as_they_are():
        return _wrapped(model, config, name, in_fp32=in_fp32)


def _wrapped(model: Any, config: LoraConfig, name: str, *, in_fp32: bool) -> Any:
    if hasattr(model, "peft_config"):
        model.add_adapter(name, config, autocast_adapter_dtype=in_fp32)
        return model
    return get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=in_fp32)


def load(
    model: Any, folder: Path, name: str, *, trained: bool, in_fp32: bool = True, dropout: float | None = None
) -> Any:
    """Return the model with the adapter of a folder, under that name. `dropout` overrides the folder's.

    Raises UserError where the folder's weights do not match the model's layers one to one, or it cannot be trusted.
    """
    folder = adapter_folder(folder)
    config: Any = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not trained
    if dropout is not None:
        config.lora_dropout = dropout
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if layers := _layers_among(config.target_parameters or [], base):
        config.target_modules = sorted(set(config.target_modules or []) | layers)
        config.target_parameters = sorted(set(config.target_parameters) - {f"{layer}.weight" for layer in layers})
    wrapped = (add if layers else _wrapped)(model, config, name, in_fp32=in_fp32)
    _set_weights(wrapped, load_file(folder / WEIGHTS), name, folder)
    return wrapped


def _layers_among(parameters: list[str], model: nn.Module) -> set[str]:
    """The linear layers whose weights are among the parameters."""
    found = {name.removesuffix(".weight") for name in parameters if name.endswith(".weight")}
    modules = dict(model.named_modules())
    plain = {name: getattr(modules.get(name), "base_layer", modules.get(name)) for name in found}
    return {name for name, module in plain.items() if isinstance(module, targets.LINEAR)}


@torch.no_grad()
def _set_weights(model: Any, saved: dict[str, Tensor], name: str, folder: Path) -> None:
    wanted = {_saved_key(key, name): parameter for key, parameter in weights_of(model, name)}
    if wanted.keys() == saved.keys() and all(wanted[key].shape == tensor.shape for key, tensor in saved.items()):
        for key, tensor in saved.items():
            wanted[key].copy_(tensor)
        return
    # Names of an older transformers or another tool: PEFT knows such names, and returns those that it could not place.
    result = set_peft_model_state_dict(model, saved, adapter_name=name)
    absent = [key for key in result.missing_keys if ".lora_" in key and f".{name}" in key]
    odd = [*result.unexpected_keys, *absent]
    if odd:
        message = f"{folder}: {len(odd)} weights of the adapter and of this model do not match, such as {odd[0]}"
        raise UserError(message, "is it the base that the adapter was trained on?")


def weights_of(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of the adapter of that name, with their names in the model."""
    for key, parameter in model.named_parameters():
        _, _, rest = key.rpartition(".lora_")
        if rest and name in rest.split("."):
            yield key, parameter


def _saved_key(key: str, name: str) -> str:
    """A weight's name in a file: without the adapter's, and a DoRA magnitude's without "weight"."""
    module, _, rest = key.rpartition(".lora_")
    parts = [part for part in rest.split(".") if part != name]
    return f"{module}.lora_{'.'.join(parts[:1] if parts[0] == 'magnitude_vector' else parts)}"


def portable(model: Any, name: str) -> LoraConfig:
    """Return the config with which plain PEFT adapts the same layers."""
    config: Any = copy.deepcopy(model.peft_config[name])
    layers = [
        key.removeprefix(PREFIX)
        for key, module in model.named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper) and name in module.r
    ]
    taken = targets.converted_by_peft(model.get_base_model(), layers)
    if taken:
        config.target_modules = sorted(set(layers) - taken)
        config.target_parameters = sorted({*(config.target_parameters or []), *(f"{layer}.weight" for layer in taken)})
        config.lora_dropout = 0.0  # of training, and refused on bare weights
        for patterns in (config.rank_pattern, config.alpha_pattern):
            patterns |= {f"{key}.weight": value for key, value in patterns.items() if key in taken}
    return config


@contextmanager
def _targets_as_they_are() -> Iterator[None]:
    """Within, PEFT takes targets by the model's present names."""
    from peft.utils import transformers_weight_conversion as conversion

    held = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None  # type: ignore[assignment]
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = held
