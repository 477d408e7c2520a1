"""Which tensors on disk make up which weights of a model: transformers' own conversion, run both ways.

Since transformers 5 names and shapes on disk differ from those in memory: experts are stacked, prefixes come and go. A
group is the input and output of one conversion, often one tensor under two names.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import set_zero3_state

from ftlaunch.errors import UserError
from ftlaunch.recipe.model import Model
from ftlaunch.safety.model_files import INDEX, WEIGHTS, shard_names
from fttrain import hub

FLOATS = {"F64", "F32", "F16", "BF16"}

Read = Callable[[str], Tensor]
"""A tensor on disk by its key."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a model on disk."""

    key: str
    file: Path
    shape: tuple[int, ...]
    format: str
    """The name that safetensors has for it: BF16, F8_E4M3."""

    @property
    def is_float(self) -> bool:
        """Whether it is a float of 16 bits or more."""
        return self.format in FLOATS

    def num_bytes(self, dtype: torch.dtype | None) -> int:
        """Return its bytes; those of a float in `dtype`, if that is given."""
        width = dtype.itemsize if dtype and self.is_float else _width(self.format)
        return width * math.prod(self.shape)


def folder_of(base: Model) -> Path:
    """Return the folder of the base's files, fetched from the hub if it is an id. Raises UserError where that fails."""
    try:
        return hub.model_folder(base.path, base.revision, allow_pickle=base.allow_pickle)
    except (OSError, ValueError) as error:
        raise UserError(f"the base {base.path} cannot be loaded: {error}", "download it and give its folder") from error


def stored(folder: Path) -> Iterator[Stored]:
    """Yield every tensor of a model, from the headers alone. Raises UserError where it has no safetensors."""
    if not (names := shard_names(folder)):
        raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}", "convert the base to safetensors first")
    for file in (folder / name for name in names):
        with safe_open(file, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118 not a dict
                view = shard.get_slice(key)
                yield Stored(key, file, tuple(view.get_shape()), view.get_dtype())


def _width(name: str) -> int:
    """Return the bytes of one element of a safetensors dtype such as BF16 or F8_E4M3."""
    return int("".join(filter(str.isdigit, name.split("_")[0])) or 8) // 8


@dataclass
class Group:
    """Tensors on disk and the weights that they become together."""

    keys: list[str] = field(default_factory=list)
    """Tensors on disk, in the order in which transformers takes them."""
    patterns: list[str] = field(default_factory=list)
    """The source pattern of the conversion that each key has matched."""
    converter: WeightConverter | None = None
    """The conversion from tensors to weights; None where the single tensor is the weight."""
    name: str = ""
    """Name of the weight, or of the first of several."""


class WeightMap:
    """The tensors on disk of a model and its weights, each found by the other."""

    def __init__(self, model: Any, keys: list[str]) -> None:
        """`keys` are those on disk. The model's own weights are never read: they may be on the meta device."""
        self.skeleton = skeleton(model)
        self._weights: dict[str, Tensor] = dict(self.skeleton.state_dict())
        self._conversions: list[WeightTransform] = get_model_conversion_mapping(self.skeleton)
        self.by_weight: dict[str, Group] = {}
        """A weight's name → its group."""
        self.by_key: dict[str, Group] = {}
        """A key on disk → its group; keys that the model does not take are missing."""
        self._group(keys)
        self.skeleton._weight_conversions = [one for one in self._conversions if one.was_used()]

    def _group(self, keys: list[str]) -> None:
        renamings = [one for one in self._conversions if isinstance(one, WeightRenaming)]
        converters = [one for one in self._conversions if isinstance(one, WeightConverter)]
        groups: dict[str, Group] = {}
        # In transformers' own order of keys: experts are stacked in it, and 10 comes after 9.
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = self._renamed(key, renamings, converters)
            # A tensor that the model does not take (a vision tower, an MTP layer) has no group: a merge copies it as it
            # is.
            if name not in self._weights:
                continue
            group = groups.setdefault(name, Group(name=name))
            group.keys.append(key)
            group.patterns.append(pattern or key)
            if pattern is not None:
                group.converter = next(one for one in converters if pattern in one.source_patterns)
            self.by_key[key] = group
        for group in groups.values():
            self.by_weight |= dict.fromkeys(self.names(group), group)

    def _renamed(
        self, key: str, renamings: list[WeightRenaming], converters: list[WeightConverter]
    ) -> tuple[str, str | None]:
        """Return the weight's name and the pattern that matched, as transformers' loading does.

        Source: `transformers.core_model_loading.convert_and_load_state_dict_in_model`.
        """
        prefix = self.skeleton.base_model_prefix
        name, pattern = rename_source_key(key, renamings, converters, prefix, self._weights)
        # A key that is a weight's name already must not be renamed away from it.
        if name not in self._weights and key in self._weights:
            return rename_source_key(key, [], [], prefix, self._weights)
        return name, pattern

    def names(self, group: Group) -> list[str]:
        """Return the names of all weights of a group: a conversion may make several."""
        if group.converter is None:
            return [group.name]
        first, *others = group.converter.target_patterns
        return [group.name, *(group.name.replace(first, other) for other in others)]

    def weights(self, group: Group, read: Read) -> dict[str, Tensor]:
        """Return the weights of a group, by their names."""
        if group.converter is None:
            return {group.name: read(group.keys[0])}
        converter = copy.deepcopy(group.converter)  # it collects tensors, and must be empty at the next use
        for key, pattern in zip(group.keys, group.patterns, strict=True):
            converter.add_tensor(group.name, key, pattern, read(key))  # type: ignore[arg-type]
        made = converter.convert(group.name, model=self.skeleton, config=self.skeleton.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}

    def stored(self, group: Group, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a group's weights as they go to disk, by key. Raises LookupError if they would get other keys."""
        if group.converter is None:
            return {group.keys[0]: weights[group.name]}
        out = revert_weight_conversion(self.skeleton, dict(weights))
        # A conversion may not be undone exactly; other keys would make a checkpoint that loads with weights missing.
        if out.keys() != set(group.keys):
            odd = sorted(out.keys() ^ set(group.keys))[0]
            raise LookupError(f"{group.name} is not written back as it was stored: {odd}")
        return out

    def new_key(self, name: str) -> str:
        """What a weight that is not on disk would be called there, such as a head that the embedding has stood for."""
        reverse = [one.reverse_transform() for one in self.skeleton._weight_conversions[::-1]]
        renamings = [one for one in reverse if isinstance(one, WeightRenaming)]
        key = apply_renamings(name, renamings)
        all_renamings = [one for one in self._conversions if isinstance(one, WeightRenaming)]
        return key if self._renamed(key, all_renamings, [])[0] == name else name


def skeleton(model: Any) -> Any:
    """A model of the same class and config without weights, whatever the model's own are held in."""
    # Building a model may write into its config.
    config = copy.deepcopy(model.config)
    # Under ZeRO-3 transformers would shard and fill the parts that a multimodal model makes of its config's tables.
    with set_zero3_state(), torch.device("meta"):
        return type(model)(config)


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return, for every name of a parameter, all its names: tied weights have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: together for together in names.values() for name in together}
