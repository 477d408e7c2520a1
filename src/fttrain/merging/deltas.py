"""The arithmetic of merging: what an adapter adds to each weight of its base, and where the weight is on disk."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, ParamWrapper
from torch import Tensor, nn

from ftlaunch.errors import UserError
from fttrain.merging.weight_map import Group, Read, Stored, WeightMap, aliases

TINY = 1e-15
"""Smallest length of a row to divide by: a row of zeros stays zero."""
SHIP_APART = "leave the merge out and ship base and adapter together"


@dataclass(frozen=True)
class Delta:
    """One adapted weight: W + scale·B·A, or its transpose where the base stores [in, out] (GPT-2) or embeddings.

    Stacked experts have an A [E, R, in] and a B [E, out, R].
    """

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool
    magnitude: Tensor | None = None
    """[out]: the length to which DoRA scales each row."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as the model holds it."""
        *experts, out, _ = self.b.shape
        sides = (self.a.shape[-1], out) if self.transposed else (out, self.a.shape[-1])
        return (*experts, *sides)

    def on(self, weight: Tensor, dtype: torch.dtype, *, as_trained: bool = False) -> Tensor:
        """Return the adapted weight, of this delta's shape, rounded to `dtype` once.

        `as_trained`: summed in fp32, as layers do that train through rounding; the next rounding may fall otherwise.
        """
        if weight.dim() == 3:  # stacked experts, each a weight of its own
            parts = zip(self.a, self.b, weight, strict=True)
            one = [Delta(a, b, self.scale, self.transposed).on(w, dtype, as_trained=as_trained) for a, b, w in parts]
            return torch.stack(one)
        # fp64 holds a product of two numbers in fp32 exactly, so that nothing is rounded before the sum is.
        wide = torch.float32 if as_trained else torch.float64
        changed = (self.b.to(wide) @ self.a.to(wide)).mul_(self.scale)
        changed = (changed.T if self.transposed else changed).add_(weight)
        if self.magnitude is None:
            return changed.to(dtype)
        # DoRA normalizes each output's row, which is a column where the weight is transposed.
        length = changed.norm(dim=0 if self.transposed else 1).clamp(min=TINY)
        ratio = self.magnitude.to(wide) / length
        return (changed * (ratio if self.transposed else ratio[:, None])).to(dtype)


def deltas(model: Any, adapter: str) -> dict[str, Delta]:
    """Return all weights that an adapter of a PEFT model changes, by their names in the plain model.

    Raises UserError for kinds that cannot be merged.
    """
    config = model.peft_config[adapter]
    if config.peft_type != "LORA":
        raise UserError("only low-rank adapters are merged", SHIP_APART)
    if config.modules_to_save or config.bias != "none" or config.lora_bias:
        raise UserError(
            "only low-rank adapters are merged, and this one has whole weights or biases as well", SHIP_APART
        )
    modules = model.get_base_model().named_modules()
    layers = [(name, one) for name, one in modules if isinstance(one, LoraLayer) and adapter in one.r]
    return dict(_delta(name, layer, adapter) for name, layer in layers)


def _delta(name: str, layer: Any, adapter: str) -> tuple[str, Delta]:
    path = ".".join(part for part in name.split(".") if part != "base_layer")
    scale = layer.scaling[adapter]
    if isinstance(layer, Embedding):
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        return f"{path}.weight", Delta(_kept(a), _kept(b), scale, True, _magnitude(layer, adapter))
    a, b = _kept(layer.lora_A[adapter].weight), _kept(layer.lora_B[adapter].weight)
    if not isinstance(layer, ParamWrapper):
        turned = bool(layer.fan_in_fan_out)
        return f"{path}.weight", Delta(a, b, scale, turned, _magnitude(layer, adapter))
    turned = False
    if layer._param_ndim == 3:  # as PEFT's `get_delta_factors` unfolds them
        a = a.reshape(layer.num_experts, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, layer.num_experts).permute(2, 0, 1)
        turned = not layer._did_swap_in_out_features
    return f"{path}.{layer.parameter_name}", Delta(a, b, scale, turned)


def _kept(parameter: Any) -> Tensor:
    """Return a copy on the CPU; of a parameter that ZeRO-3 has sharded, only the shape."""
    if hasattr(parameter, "ds_shape"):
        return torch.empty(parameter.ds_shape, device="meta")
    return parameter.detach().to("cpu", copy=True)


def _magnitude(layer: Any, adapter: str) -> Tensor | None:
    if adapter not in layer.lora_magnitude_vector:
        return None
    return _kept(layer.lora_magnitude_vector[adapter].weight)


Finish = Callable[[str, Delta | None, Tensor], Tensor]
"""(name, delta or None, weight) → the weight to write."""


@dataclass(frozen=True)
class Fitted:
    """An adapter's deltas, each with its place among the tensors of the base."""

    of: dict[str, Delta]
    """Deltas by names of weights that are on disk, and of a head that was tied to the embedding."""
    map: WeightMap
    tied: tuple[str, str] | None = None
    """Input embedding and head, where they are one weight and an adapter changes one of them: they must be untied."""

    @property
    def head_keys(self) -> list[str]:
        """Keys of the head's tensors, where the base has it on disk."""
        head = _name(self.map.skeleton, self.map.skeleton.get_output_embeddings())
        group = self.map.by_weight.get(f"{head}.weight")
        return [] if group is None else group.keys

    def groups(self) -> Iterator[Group]:
        """Yield the groups of tensors that change, each once."""
        # With a pair to untie, the embedding's group is rewritten even if only the head is adapted: the head's new
        # tensor is made from it.
        names = self.of if self.tied is None else [*self.of, self.tied[0]]
        found = {id(group): group for name in names if (group := self.map.by_weight.get(name)) is not None}
        yield from found.values()

    def fold(self, group: Group, read: Read, finish: Finish) -> dict[str, Tensor]:
        """Return a group's tensors in the merged model, by keys on disk; with the head, if it is untied from these."""
        weights = self.map.weights(group, read)
        changed = {name: finish(name, self.of.get(name), weight) for name, weight in weights.items()}
        out = self.map.stored(group, changed)
        if self.tied is not None and self.tied[0] in weights:
            embedding, head = self.tied
            key = self.map.new_key(head)
            if head in self.map.by_weight:  # a copy that the base has on disk and never reads
                key = self.map.by_weight[head].keys[0]
            out[key] = finish(head, self.of.get(head), weights[embedding]).clone()
        return {key: tensor.contiguous() for key, tensor in out.items()}

    def rehearse(self, stored: dict[str, Stored]) -> None:
        """Raise UserError unless each group converts to weights and back with the shapes that the adapter has."""
        # On the meta device tensors have shapes and no content, so this takes a second for a model of any size.
        for group in self.groups():
            for key in group.keys:
                if not stored[key].is_float:
                    raise UserError(
                        f"{key} is adapted, and the base has it in few bits ({stored[key].format}): no merge fits",
                        f"name a base with weights in 16 bits, or {SHIP_APART}",
                    )
            try:
                self.fold(group, lambda key: torch.empty(stored[key].shape, device="meta"), _same_shape)
            except (LookupError, RuntimeError, ValueError) as error:
                message = f"{group.name} is adapted, and cannot be written back as the base has it: {error}"
                raise UserError(message, SHIP_APART) from error


def _same_shape(name: str, delta: Delta | None, weight: Tensor) -> Tensor:
    if delta is not None and tuple(weight.shape) != delta.shape:
        raise ValueError(f"{name} is {list(weight.shape)} on disk and {list(delta.shape)} in the adapter")
    return weight


def fitted(added: dict[str, Delta], places: WeightMap) -> Fitted:
    """Return an adapter's deltas with each weight found on disk. Raises UserError for a weight that is not there."""
    model = places.skeleton
    shared = aliases(model)
    ends = tuple(_name(model, end) for end in (model.get_input_embeddings(), model.get_output_embeddings()))
    embedding, head = (f"{end}.weight" for end in ends)
    tied = head in shared.get(embedding, [])
    of: dict[str, Delta] = {}
    for name, delta in added.items():
        if tied and name in (embedding, head):
            of[name] = delta
            continue
        # Other ties than embedding and head, such as shared layers, cannot be undone by a key of the config.
        if len(shared.get(name, [])) > 1:
            others = [other for other in shared[name] if other != name]
            message = f"{name} is adapted, and is one weight with {others[0]}: a merge would change both"
            raise UserError(message, f"leave it out of adapter.targets, or {SHIP_APART}")
        if name not in places.by_weight:
            message = f"the adapter changes {name}, which the base does not have on disk"
            raise UserError(message, f"name the base that it was trained on, or {SHIP_APART}")
        of[name] = delta
    parted = tied and (embedding in of or head in of)
    if parted and embedding not in places.by_weight:
        message = f"the base stores {head} in the place of {embedding}, and only one of the two is adapted"
        raise UserError(message, f"leave it out of adapter.targets, or {SHIP_APART}")
    return Fitted(of, places, (embedding, head) if parted else None)


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, one in model.named_modules() if one is module)
