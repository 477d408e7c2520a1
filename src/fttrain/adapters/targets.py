"""Which modules of a model an adapter is put on: `targets` and `layers` of a recipe as names of modules."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ftlaunch.errors import UserError
from ftlaunch.recipe import Adalora, Dora, LowRank, Pissa

ALL_LINEAR = "all-linear"
LINEAR = (nn.Linear, Conv1D)
"""bitsandbytes' quantized layers are among them."""


def names(model: nn.Module, adapter: LowRank) -> list[str]:
    """Full names of the modules to adapt, in the model's order. Raises UserError where a target or layer is missing."""
    kinds = LINEAR if isinstance(adapter, Adalora | Dora | Pissa) else (*LINEAR, nn.Embedding)
    able = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    found = _targeted(model, able, adapter.targets)
    if adapter.layers is None:
        return found
    prefix, count = _layers(model)
    wanted = {f"{prefix}.{number}" for number in numbers(adapter.layers, count)}
    depth = prefix.count(".") + 2
    kept = [name for name in found if ".".join(name.split(".")[:depth]) in wanted]
    if not kept:
        raise UserError(f"adapter.targets {adapter.targets!r}: none of them is in a layer", _candidates(able))
    return kept


def numbers(layers: list[int] | str, count: int) -> list[int]:
    """The layers meant, out of `count`. Raises UserError where there are not so many."""
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


def _targeted(model: nn.Module, able: list[str], targets: str | list[str]) -> list[str]:
    if targets == ALL_LINEAR:
        return list(_all_linear(model, able))
    if isinstance(targets, str):
        found, missing = [name for name in able if re.fullmatch(targets, name)], [targets]
    else:
        found = [name for name in able if any(_is(name, target) for target in targets)]
        missing = [target for target in targets if not any(_is(name, target) for name in able)]
    if not found or (missing and isinstance(targets, list)):
        told = ", ".join(map(repr, missing))
        raise UserError(f"adapter.targets: nothing in the model that can be adapted matches {told}", _candidates(able))
    return found


def _is(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _all_linear(model: Any, able: list[str]) -> Iterator[str]:
    head = model.get_output_embeddings()
    for name in able:
        module = model.get_submodule(name)
        if module is not head and isinstance(module, LINEAR):
            yield name


def _layers(model: Any) -> tuple[str, int]:
    """Name of the list of a model's layers, and how many there are."""
    count = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, count
    raise UserError(f"adapter.layers: no list of {count} layers is found in the model", "leave layers out")


def _candidates(able: list[str]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in able})
    return f'use "{ALL_LINEAR}", names among {", ".join(ends)}, or a regular expression over names like {able[-2]}'
