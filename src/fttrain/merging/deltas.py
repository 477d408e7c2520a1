"""The arithmetic of merging: what an adapter on disk adds to each weight of the base. One entry a kind of adapter."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ftlaunch.errors import UserError

PREFIX = "base_model.model."
HEAD = "lm_head.weight"
TINY = 1e-15
"""Least length of a row: one that is all zero stays zero."""


@dataclass(frozen=True)
class Delta:
    """One adapted weight: W + scale·B·A, or its transpose where the base stores [in, out] (GPT-2) or embeddings."""

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool
    magnitude: Tensor | None = None
    """[out]: what DoRA brings the length of each row to."""

    def dense(self) -> Tensor:
        """The product scale·B·A as the weight is stored, in fp32."""
        product = self.scale * (self.b.float() @ self.a.float())
        return product.T if self.transposed else product

    def on(self, weight: Tensor) -> Tensor:
        """The adapted weight as it is stored, in fp32."""
        changed = weight.float() + self.dense()
        if self.magnitude is None:
            return changed
        length = changed.norm(dim=0 if self.transposed else 1).clamp(min=TINY)
        ratio = self.magnitude.float() / length
        return changed * (ratio if self.transposed else ratio[:, None])


@dataclass(frozen=True)
class Deltas:
    """All adapted weights, by their key in the base's files."""

    of: dict[str, Delta]
    embedding: str | None = None
    """Key of the input embedding, if the head shares it and one of the two is adapted: then they must part."""

    @property
    def unties(self) -> bool:
        return self.embedding is not None

    @staticmethod
    def read(folder: Path) -> "Deltas":
        """The adapter in a PEFT folder. Raises UserError for kinds that cannot be merged here."""
        config = json.loads((folder / "adapter_config.json").read_text())
        if config["peft_type"] != "LORA" or config.get("modules_to_save"):
            raise UserError(f"{folder}: only low-rank adapters are merged", "ship the base and the adapter together")
        tensors = load_file(folder / "adapter_model.safetensors")
        found: dict[str, Delta] = {}
        for key, tensor in tensors.items():
            for mark, other in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
                if key.endswith(mark):
                    module = key.removesuffix(mark)
                    transposed = mark == ".lora_embedding_A" or bool(config.get("fan_in_fan_out"))
                    path = module.removeprefix(PREFIX)
                    scale = _scale(config, path, rank=tensor.shape[0])
                    magnitude = tensors.get(f"{module}.lora_magnitude_vector")
                    found[f"{path}.weight"] = Delta(tensor, tensors[module + other], scale, transposed, magnitude)
        if not found:
            raise UserError(f"{folder} holds no LoRA weights", "was it saved under ZeRO-3 without gathering?")
        return Deltas(found)

    def fitted(self, *, tied: bool, keys: set[str]) -> "Deltas":
        """The same with keys as the base's files spell them. Raises UserError for a weight that the base has not."""
        renamed: dict[str, Delta] = {}
        embedding = next((key for key in keys if key.endswith(("embed_tokens.weight", "wte.weight"))), None)
        parted = False
        for key, delta in self.of.items():
            short = key.partition(".")[2]
            name = next((candidate for candidate in (key, short) if candidate in keys), None)
            if name is None and key == HEAD and tied:
                name = HEAD
            if name is None:
                raise UserError(f"the adapter changes {key}, which the base does not have", "is it the right base?")
            parted |= tied and name in (HEAD, embedding)
            renamed[name] = delta
        return replace(self, of=renamed, embedding=embedding if parted else None)

    def fold(self, key: str, weight: Tensor, dtype: torch.dtype | None, *, through: str | None) -> dict[str, Tensor]:
        """What stands for `key` in the merged model: one tensor, or two where head and embedding part.

        `through` names the format in which training held the weight, if it did.
        """
        out = {key: self._folded(key, weight, dtype, through=through)}
        if key == self.embedding:
            out[HEAD] = self._folded(HEAD, weight, dtype, through=None).clone()
        return out

    def _folded(self, key: str, weight: Tensor, dtype: torch.dtype | None, *, through: str | None) -> Tensor:
        target = dtype or weight.dtype
        if through is not None:
            weight = _through(weight, through)
        delta = self.of.get(key)
        if delta is None:
            return weight.to(target).contiguous()
        return delta.on(weight).to(target).contiguous()


def _scale(config: dict[str, Any], path: str, rank: int) -> float:
    """alpha / r, or alpha / √r with rsLoRA; alpha by PEFT's patterns of module names where there are any."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), config["lora_alpha"]
    )
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _through(weight: Tensor, quantization: str) -> Tensor:
    """The weight as training saw it: to 4 bits with double quantization, or to 8, and back."""
    import bitsandbytes.functional as bnb

    if quantization == "int8":
        codes, largest, _ = bnb.int8_vectorwise_quant(weight.half().contiguous())
        return bnb.int8_vectorwise_dequant(codes, largest)
    packed, state = bnb.quantize_4bit(weight.contiguous(), quant_type=quantization, compress_statistics=True)
    return bnb.dequantize_4bit(packed, state)
