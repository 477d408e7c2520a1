"""The weights of a model that an adapter is put on: a recipe's `targets`, `layers` and `experts` as names."""

import functools
import inspect
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import Dora, Lora, LowRank

ALL_LINEAR = "all-linear"
LINEAR = (nn.Linear, Conv1D)
"""bitsandbytes' quantized layers are among them."""
QUANTIZED = {"Linear4bit", "Linear8bitLt"}
CHOOSERS = {"router", "gate", "indexer", "shared_expert_gate"}
"""Parts of a module's path: modules below them choose experts or tokens."""

CHOOSES = "it chooses experts or tokens"
NO_LINEAR_MAP = "it computes more than a linear map"
READ_PAST = "the model's own kernels read its weight past an adapter"
SHARED = "its weight is another layer's as well, and a merge would change both"
UNLOADABLE = "PEFT would load it as a bare weight, for which it has no DoRA"


def names(model: nn.Module, adapter: LowRank) -> list[str]:
    """Return full names of the modules to adapt, in the model's order. UserError where a target or layer is missing.

    All are inside the text body, except the output head where the recipe names it.
    """
    left = left_out(model, adapter)
    able = [name for name in _candidates(model, adapter) if name not in left]
    found = _targeted(model, able, adapter.targets, left)
    if adapter.layers is None:
        return found
    kept = _in_layers(model, adapter.layers, found)
    if not kept:
        raise UserError(f"adapter.targets {adapter.targets!r}: none of them is in a layer", _known(able))
    return kept


def left_out(model: nn.Module, adapter: LowRank) -> dict[str, str]:
    """Linear modules of the text body that no adapter is put on, each with the reason."""
    candidates = _candidates(model, adapter)
    # Shared weights are found on the whole text body, before `targets` and `layers` narrow it: a partner may lie
    # outside.
    shared = _shared(model, candidates)
    reasons = {name: SHARED if name in shared else _reason(model, name) for name in candidates}
    if isinstance(adapter, Dora):
        converted = converted_by_peft(model, list(reasons))
        reasons = {name: reason or (UNLOADABLE if name in converted else None) for name, reason in reasons.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def experts(model: nn.Module, adapter: LowRank) -> list[str]:
    """Return full names of the parameters that hold the stacked experts of `adapter.layers`; [] without experts."""
    prefix, body = body_of(model)
    found = [
        f"{prefix}{name}.{key}"
        for name, module in body.named_modules()
        if _holds_experts(name, module)
        for key, parameter in module.named_parameters(recurse=False)
        if not key.endswith("bias") and _is_matrices(parameter)
    ]
    return found if adapter.layers is None else _in_layers(model, adapter.layers, found)


def _holds_experts(name: str, module: nn.Module) -> bool:
    named = "experts" in name.split(".") or "expert" in type(module).__name__.lower()
    return named and not isinstance(module, (*LINEAR, nn.Embedding))


def _is_matrices(parameter: nn.Parameter) -> bool:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) in (2, 3) and min(shape) > 1


def token_table(causal: Any) -> nn.Embedding:
    """Return the embedding of tokens, without the adapter that may be on it."""
    embedding = causal.get_input_embeddings()
    return getattr(embedding, "base_layer", embedding)


def body_of(model: Any) -> tuple[str, nn.Module]:
    """Return the prefix of the text body's modules, such as "model." or "model.language_model.", and the body."""
    body, embedding = model.get_decoder(), model.get_input_embeddings()
    # ModernBERT's decoder is called "decoder" and is its head.
    if body is model or all(module is not embedding for module in body.modules()):
        body = next(child for child in model.children() if any(module is embedding for module in child.modules()))
    return next(f"{name}." for name, module in model.named_modules() if module is body), body


def converted_by_peft(model: nn.Module, modules: list[str]) -> set[str]:
    """Return the names that PEFT would take for experts of an older transformers, whatever they are."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=list(modules))
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # it has no place for one of two that it would join
        return {name for name in modules if name.rpartition(".")[2] in ("gate_proj", "up_proj", "down_proj", "gate")}
    return set(modules) - set(config.target_modules or [])


def _candidates(model: Any, adapter: LowRank) -> list[str]:
    """Return names of the layers of the text body that hold a matrix, and of the head."""
    kinds = (*LINEAR, nn.Embedding) if adapter.is_plain else LINEAR
    prefix, _ = body_of(model)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) and (name.startswith(prefix) or any(module is end for end in ends))
    ]


def _shared(model: Any, names: list[str]) -> set[str]:
    """Those of the layers whose weight is also another's, as Zamba's blocks are; a tied head is another matter."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    layers = {name: model.get_submodule(name) for name in names}
    weights = {name: id(layer.weight) for name, layer in layers.items() if all(layer is not end for end in ends)}
    often = Counter(weights.values())
    return {name for name, weight in weights.items() if often[weight] > 1}


def _reason(model: nn.Module, name: str) -> str | None:
    """Return why a layer cannot have an adapter; None where it can."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(name)
    if CHOOSERS & set(name.split(".")):
        return CHOOSES
    if not isinstance(module, nn.Embedding) and not is_linear_map(type(module)):
        return NO_LINEAR_MAP
    if path and leaf in _read_by_code(type(model.get_submodule(path))):
        return READ_PAST
    return None


@functools.cache
def is_linear_map(kind: type) -> bool:
    """Return whether layers of this class compute xWᵀ + b and nothing else; a class with its own forward is tried.

    A router that inherits from nn.Linear may return a tuple, a grouped layer another shape.
    """
    if kind.forward in (nn.Linear.forward, Conv1D.forward) or kind.__name__ in QUANTIZED:
        return True
    try:
        # Small and on the CPU even where the model is being built on the meta device, on which nothing can be compared.
        with torch.device("cpu"):
            layer, x = kind(8, 4, bias=False), torch.randn(2, 3, 8)
            said = layer(x)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False
    return torch.is_tensor(said) and said.shape == (2, 3, 4) and torch.allclose(said, F.linear(x, layer.weight))


@functools.cache
def _read_by_code(parent: type) -> frozenset[str]:
    """Return names of layers whose weights a module's code hands to a kernel, as Mamba does with out_proj."""
    # Such a weight is read past the layer's forward, and with it past the adapter, which would then never be trained.
    return frozenset(re.findall(r"self\.(\w+)\.weight\s*(?:[,@)]|\.clamp\()", _code(parent)))


def is_read_past(model: nn.Module, parameter: str) -> bool:
    """Return whether the code around a module reads this parameter of it, as DBRX's does: no adapter can be on it."""
    path, _, key = parameter.rpartition(".")
    holder, _, leaf = path.rpartition(".")
    return f"self.{leaf}.{key}" in _code(type(model.get_submodule(holder)))


@functools.cache
def _code(kind: type) -> str:
    """Return the source of a module's class and of what it inherits from its library; empty where there is none."""
    own = [each for each in kind.__mro__ if each.__module__.startswith(kind.__module__.partition(".")[0])]
    try:
        return "".join(inspect.getsource(each) for each in own)
    except (OSError, TypeError):
        return ""


def numbers(layers: list[int] | str, count: int) -> list[int]:
    """Return the numbers of the layers that a recipe means, out of `count`. Raises UserError where there are fewer."""
    if isinstance(layers, list):
        wrong = [number for number in layers if number >= count]
        if wrong or not layers:
            said = f"has no layer {wrong[0]}" if wrong else "is empty"
            raise UserError(f"adapter.layers: the model {said}", f"name layers from 0 to {count - 1}")
        return sorted(set(layers))
    word, _, size = layers.partition(":")
    if int(size) > count:
        raise UserError(f"adapter.layers {layers!r}: the model has {count} layers", f'write "{word}:{count}" at most')
    return list(range(count - int(size), count)) if word == "top" else list(range(int(size) - 1, count, int(size)))


def _in_layers(model: nn.Module, layers: list[int] | str, found: list[str]) -> list[str]:
    # Whole path components are compared: layer 1 must not take layers 10 to 19 along.
    prefix, count = layers_of(model)
    wanted = {f"{prefix}.{number}" for number in numbers(layers, count)}
    depth = prefix.count(".") + 2
    return [name for name in found if ".".join(name.split(".")[:depth]) in wanted]


def _targeted(model: Any, able: list[str], targets: str | list[str], left: dict[str, str]) -> list[str]:
    if targets == ALL_LINEAR:
        head = model.get_output_embeddings()
        layers = ((name, model.get_submodule(name)) for name in able)
        found = [name for name, layer in layers if layer is not head and isinstance(layer, LINEAR)]
        missing = [ALL_LINEAR]
    elif isinstance(targets, str):
        found, missing = [name for name in able if re.fullmatch(targets, name)], [targets]
    else:
        found = [name for name in able if any(_is(name, target) for target in targets)]
        missing = [target for target in targets if not any(_is(name, target) for name in able)]
    if not found or (missing and isinstance(targets, list)):
        told = ", ".join(map(repr, missing))
        reasons = {reason for name, reason in left.items() if _is_meant(name, targets)}
        because = f" ({'; '.join(sorted(reasons))})" if reasons else ""
        # `targets` are of layers; stacked experts are parameters, which another key adapts.
        stacked = any(_is_meant(name, missing) for name in experts(model, Lora()))
        remedy = "write experts = true in [adapter] for the experts, and leave them out of targets" if stacked else None
        raise UserError(
            f"adapter.targets: nothing in the model that can be adapted matches {told}{because}", remedy or _known(able)
        )
    return found


def _is(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _is_meant(name: str, targets: str | list[str]) -> bool:
    if isinstance(targets, list):
        return any(_is(name, target) for target in targets)
    return targets == ALL_LINEAR or bool(re.fullmatch(targets, name))


def layers_of(model: Any) -> tuple[str, int]:
    """Return the name of the list of the text body's layers, and their number."""
    count = model.config.get_text_config().num_hidden_layers
    prefix, body = body_of(model)
    # By length: families call the list layers, h, blocks or decoder.layers, and a mixture of experts has other lists.
    for name, module in body.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return f"{prefix}{name}", count
    raise UserError(f"adapter.layers: no list of {count} layers is found in the model", "leave layers out")


def _known(able: list[str]) -> str:
    if not able:
        return "train it in full: leave [adapter] out"
    ends = sorted({name.rpartition(".")[2] for name in able})
    return f'use "{ALL_LINEAR}", names among {", ".join(ends)}, or a regular expression over names like {able[-2:][0]}'


def collapsed(names: Iterable[str]) -> list[str]:
    """Return names with their numbers replaced by *, each once: "model.layers.*.mlp.up_proj"."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))
