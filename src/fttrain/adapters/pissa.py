"""PiSSA (arXiv 2404.02948): A and B begin as the principal part of W instead of zero, and the rest of W is frozen.

The rest is never computed: y = Wx + s(BA - B₀A₀)x is the same, with the start B₀A₀ frozen. So the base stays unchanged
for other users of it, no bits of W are lost to rounding, and [A; A₀] with [B, -B₀] is a plain LoRA adapter of twice the
rank, which is saved. From 4-bit weights the start is computed from the dequantized weights; they are not quantized a
second time.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import LoraVariant
from safetensors.torch import load_file
from torch import Tensor, nn

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import Pissa
from fttrain.adapters.frozen_weights import weight_of, whole
from fttrain.adapters.low_rank import Method as LowRankMethod


def principal(weight_OI: Tensor, rank: int, scale: float, iterations: int | None) -> tuple[Tensor, Tensor]:
    """Return (A [R, in], B [out, R]) of equal norm, whose scale·B·A is the weight's best approximation of this rank."""
    if iterations is None:
        u_OK, s_K, vt_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    else:
        width = min(2 * rank, *weight_OI.shape)  # a randomized SVD gets its last directions wrong; these are cut off
        u_OK, s_K, v_IK = torch.svd_lowrank(weight_OI, width, niter=iterations)
        vt_KI = v_IK.T
    root_R = (s_K[:rank] / scale).sqrt()
    return root_R[:, None] * vt_KI[:rank], u_OK[:, :rank] * root_R


class Principal(nn.Module):
    """The trained product less the initial one. A and B are the layer's own, as in `Magnitude`."""

    a0: Tensor
    b0: Tensor

    def __init__(self, layer: Any, adapter: str, a0_RI: Tensor, b0_OR: Tensor) -> None:
        super().__init__()
        self.a: nn.Parameter = layer.lora_A[adapter].weight
        self.b: nn.Parameter = layer.lora_B[adapter].weight
        self.register_buffer("a0", a0_RI.to(self.a).clone(), persistent=False)
        self.register_buffer("b0", b0_OR.to(self.b).clone(), persistent=False)
        self._scale: float = layer.scaling[adapter]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, torch.cat([self.a, self.a0])), torch.cat([self.b, -self.b0], dim=1) * self._scale)


class _Variant(LoraVariant):
    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:
        return result + module.pissa(module.lora_dropout[active_adapter](x))


class Starts:
    """The starts of all layers, for checkpoints: a second decomposition might differ in the last bits."""

    def __init__(self, model: nn.Module) -> None:
        self._parts = {name: module for name, module in model.named_modules() if isinstance(module, Principal)}

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": value for name, part in self._parts.items() for key, value in part.named_buffers()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        for name, buffer in self.state_dict().items():
            buffer.copy_(tensors[name])


class Method(LowRankMethod[Pissa]):
    """Decomposed at the start, and saved with it."""

    is_saved_as_trained = False

    def install(self, model: nn.Module, start: Path | None) -> None:
        """Give every layer of the adapter its start and this arithmetic.

        From an artifact folder `start` it goes on as that was left; otherwise W is decomposed.
        """
        saved = {} if start is None else load_file(start / "adapter_model.safetensors")
        for path, layer in self.layers(model):
            if saved:
                a_2RI, b_O2R = (saved[f"{path}.lora_{letter}.weight"] for letter in "AB")
                (a, a0), (b, minus_b0) = a_2RI.chunk(2), b_O2R.chunk(2, dim=1)
                start_of = a0, -minus_b0
            else:
                rank, most = layer.r[self.name], min(layer.in_features, layer.out_features)
                if rank > most:
                    raise UserError(f"adapter.rank {rank}: {path} has only {most} directions", "write a smaller rank")
                with whole(layer.get_base_layer().weight):
                    a, b = principal(weight_of(layer), rank, layer.scaling[self.name], self.adapter.svd_iterations)
                start_of = a, b
            with torch.no_grad():
                layer.lora_A[self.name].weight.copy_(a)
                layer.lora_B[self.name].weight.copy_(b)
            layer.add_module("pissa", Principal(layer, self.name, *start_of))
            layer.lora_variant[self.name] = _Variant()

    def as_plain_lora(self, model: nn.Module, weights: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
        """The trained weights [r, …] and starts as one adapter of rank 2r; the config is changed to say so."""
        doubled = dict(weights)
        for name, layer in self.layers(model):
            key_a, key_b = self.keys(name)
            doubled[key_a] = torch.cat([weights[key_a], layer.pissa.a0.float().cpu()])
            doubled[key_b] = torch.cat([weights[key_b], -layer.pissa.b0.float().cpu()], dim=1)
        config.r *= 2
        config.lora_alpha *= 2
        return doubled

    def state(self, model: nn.Module, num_steps: int) -> Starts:  # noqa: ARG002 as `Method` has it
        return Starts(model)
