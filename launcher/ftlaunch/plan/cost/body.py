"""How much of a model an adapter is on, or few-bit formats hold: counted from the headers of its weight files."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct

from ftlaunch.plan.cost import shape, trained
from ftlaunch.recipe.adapter import SUPER_WEIGHTS, LowRank
from ftlaunch.recipe.names import is_local
from ftlaunch.safety.model_files import shard_names

LARGEST_HEADER = 1 << 28
"""Bytes. A length beyond it is that of no safetensors file."""
ELSEWHERE = re.compile("vision|visual|image|audio|speech|projector")
"""Parts of multimodal models that text does not go through."""
ENDS = re.compile("embed|lm_head|wte|wpe|^head$|^score$")
"""Embeddings and heads."""
CHOOSERS = {"router", "gate", "indexer", "shared_expert_gate"}
"""Parts of a tensor's name: what is below them chooses experts or tokens, and is never adapted."""
BLOCKS, PER_BYTE = "_blocks", 2
"""How tensors end that hold two 4-bit weights in a byte (MXFP4)."""


class Body(Struct, frozen=True, kw_only=True):
    """Numbers of weights in the matrices of a model's text body, without embeddings and head."""

    linear: dict[str, int]
    """Weights by the name of each linear layer."""
    experts: dict[str, int]
    """Weights by the name of each tensor of experts, stacked or not."""
    rest: int
    """Weights in matrices that belong to no layer or are never adapted."""

    @property
    def total(self) -> int:
        return sum(self.linear.values()) + sum(self.experts.values()) + self.rest

    @property
    def expert_share(self) -> float:
        """Share of the weights that are experts, from 0 to 1."""
        return sum(self.experts.values()) / max(self.total, 1)

    def adapted_share(self, adapter: LowRank) -> float | None:
        """Share of the weights that an adapter is on; None where names on disk do not tell."""
        if adapter.layers == SUPER_WEIGHTS:
            return None
        asked = _numbers(adapter, max((_layer(name) + 1 for name in (*self.linear, *self.experts)), default=0))
        linear = sum(size for name, size in self.linear.items() if _is_meant(name, adapter) and _layer(name) in asked)
        if not linear and adapter.targets != "all-linear":
            return None
        experts = sum(size for name, size in self.experts.items() if adapter.experts and _layer(name) in asked)
        return (linear + experts) / max(self.total, 1)


def read(path: str) -> Body | None:
    """Return the body of the model in a folder or of a well-known hub id; None where neither files nor config tell."""
    try:
        tensors = dict(_headers(Path(path))) if is_local(path) else {}
    except (OSError, ValueError, TypeError, KeyError):
        tensors = {}
    return of_tensors(tensors) if tensors else _of_shape(shape.read(path))


def of_tensors(tensors: dict[str, tuple[int, ...]]) -> Body:
    """Return the body of a model whose tensors have these names and shapes."""
    linear, experts, rest = dict[str, int](), dict[str, int](), 0
    for key, sides in tensors.items():
        parts = key.split(".")
        if len(sides) < 2 or ELSEWHERE.search(key.lower()) or any(ENDS.search(part) for part in parts):
            continue
        size, name = math.prod(sides), key.removesuffix(".weight")
        is_convolution = len(sides) == 3 and (min(sides) == 1 or "conv" in key)
        is_stacked = len(sides) == 3 and not is_convolution and name != key
        if key.endswith(BLOCKS):
            experts[name] = PER_BYTE * size
        elif "scale" in parts[-1] or key.endswith("bias"):
            continue
        elif "experts" in parts or is_stacked:
            experts[name] = size
        elif CHOOSERS & set(parts) or is_convolution or name == key:
            rest += size
        else:
            linear[name] = size
    return Body(linear=linear, experts=experts, rest=rest)


def _headers(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each tensor. Raises OSError or ValueError for what is no safetensors file."""
    for name in shard_names(folder):
        with (folder / name).open("rb") as file:
            # The format: 8 bytes with the header's length, little end first, then the header as JSON.
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError(f"{name} is no safetensors file")
            header: dict[str, Any] = json.loads(file.read(length))
        for key, about in header.items():
            if key != "__metadata__":
                yield key, tuple(about["shape"])


def _of_shape(found: shape.Shape | None) -> Body | None:
    """Return the body as a config tells it, of a family whose layers are known."""
    if found is None or shape.is_guess(found):
        return None
    layers = range(found.layers)
    sizes = {f"layers.{layer}.{one.name}": one.inputs * one.outputs for layer in layers for one in found.linears}
    routers = [name for name in sizes if name.endswith(".gate")]
    experts = {f"layers.{layer}.experts": found.expert_parameters for layer in layers if found.expert_parameters}
    rest = sum(sizes.pop(name) for name in routers)
    return Body(linear=sizes, experts=experts, rest=rest)


def _numbers(adapter: LowRank, count: int) -> set[int]:
    # -1 is what lies in no layer, which an adapter of some layers leaves out.
    numbers = set(trained.numbers(adapter.layers, count))
    return numbers | {-1} if adapter.layers is None else numbers


def _layer(name: str) -> int:
    """Return the number of the layer that a tensor belongs to; -1 for one outside the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def _is_meant(name: str, adapter: LowRank) -> bool:
    targets = adapter.targets
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, name))
    return any(name == target or name.endswith(f".{target}") for target in targets)
