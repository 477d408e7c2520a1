"""DoRA (arXiv 2402.09353) at about LoRA's price: y = m/n · (Wx + sBAx), with n = ‖W + sBA‖ of each row of W.

PEFT makes and saves the weights; the arithmetic is ours. Of each row, ‖W + sBA‖² = ‖W‖² + 2s⟨W, BA⟩ + s²‖BA‖², and
neither product on the right needs the matrix BA: ⟨W, BA⟩ is read off WAᵀ, ‖BA‖² off AAᵀ, both as narrow as the rank.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from fttrain.adapters.weights import weight_of, whole

TINY = 1e-30
"""Least square of a norm: a row that is all zero stays finite."""


def install(model: nn.Module, adapter: str, *, fresh: bool) -> None:
    """Put this arithmetic into every DoRA layer of the adapter of that name; `fresh` also sets m = ‖W‖.

    A row of W that is zero gets a direction, a row of B, as it has none of its own; it is m that keeps it at zero.
    """
    for layer in _layers(model, adapter):
        with whole(layer.get_base_layer().weight):
            squares_O = weight_of(layer).square().sum(1)
        magnitude = Magnitude(layer, adapter, squares_O)
        if fresh:
            with torch.no_grad():
                magnitude.weight.copy_(squares_O.sqrt())
                magnitude.b[squares_O == 0] = 1.0
        layer.lora_magnitude_vector[adapter] = magnitude
        layer.lora_variant[adapter] = _Variant()


def _layers(model: nn.Module, adapter: str) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_magnitude_vector:
            yield module


class Magnitude(nn.Module):
    """What makes a LoRA layer a DoRA layer: the lengths m of the rows, and the arithmetic.

    A and B are the layer's own; held here too, they are gathered under ZeRO-3 when this module is called.
    """

    def __init__(self, layer: Any, adapter: str, squares_O: Tensor) -> None:
        super().__init__()
        self.weight: nn.Parameter = layer.lora_magnitude_vector[adapter].weight
        self.a: nn.Parameter = layer.lora_A[adapter].weight
        self.b: nn.Parameter = layer.lora_B[adapter].weight
        self.bias: nn.Parameter | None = getattr(layer.get_base_layer(), "bias", None)
        self._scale: float = layer.scaling[adapter]
        self._squares_O = squares_O  # no buffer: DeepSpeed would round it to 16 bits

    def forward(self, x: Tensor, base: Tensor, base_layer: nn.Module) -> Tensor:
        """m/n · (Wx + sBAx) + bias, where `base` is what the frozen layer says, and `x` is given to A."""
        ratio_O = self.weight.float() / self._norm(base_layer, x.dtype)
        y_NO: Any = _Stretch.apply(base.flatten(0, -2), ratio_O - 1)
        if self.bias is not None:
            y_NO = y_NO - (self.bias * (ratio_O - 1)).to(y_NO.dtype)
        b_OR = (self._scale * ratio_O)[:, None] * self.b
        low_NR = F.linear(x, self.a).flatten(0, -2)
        return y_NO.addmm_(low_NR.to(y_NO.dtype), b_OR.T.to(y_NO.dtype)).view(base.shape)

    @torch.no_grad()
    def _norm(self, base_layer: nn.Module, dtype: torch.dtype) -> Tensor:
        """[out]: n, in the format of m, so that the two are equal at the start."""
        wa_RO = base_layer(self.a.to(dtype))  # through the layer itself, as its weight may be quantized or sharded
        if self.bias is not None:
            wa_RO = wa_RO - self.bias
        with torch.autocast(wa_RO.device.type, enabled=False):
            a, b = self.a.float(), self.b.float()
            self._squares_O = self._squares_O.to(b.device)
            inner_O = (b * wa_RO.float().T).sum(1)
            product_O = (b @ (a @ a.T) * b).sum(1)
            squares_O = self._squares_O + 2 * self._scale * inner_O + self._scale**2 * product_O
        return squares_O.clamp(min=TINY).sqrt().to(self.weight.dtype).float()


ROWS = 64
"""Rows of a gradient that a CPU multiplies at once: few enough to stay in its cache. Fresh memory costs more than
arithmetic there."""


class _Stretch(torch.autograd.Function):
    """base·(1 + delta) by column, in one pass over `base` each way, and in its own format."""

    @staticmethod
    def forward(ctx: Any, base_NO: Tensor, delta_O: Tensor) -> Tensor:
        ctx.save_for_backward(base_NO, delta_O)
        return torch.addcmul(base_NO, base_NO, delta_O.to(base_NO.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        base_NO, delta_O = ctx.saved_tensors
        (grad_NO,) = grads
        rows = ROWS if grad_NO.device.type == "cpu" else len(grad_NO)
        pairs = zip(grad_NO.split(rows), base_NO.split(rows), strict=True)
        towards_delta_O = sum((one * other).sum(0, dtype=torch.float32) for one, other in pairs)
        assert isinstance(towards_delta_O, Tensor)
        return torch.addcmul(grad_NO, grad_NO, delta_O.to(grad_NO.dtype)), towards_delta_O


class _Variant(DoraLinearVariant):
    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:
        dropped = module.lora_dropout[active_adapter](x)
        return module.lora_magnitude_vector[active_adapter](dropped, result, module.get_base_layer())
