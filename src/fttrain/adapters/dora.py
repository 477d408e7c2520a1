"""DoRA (arXiv 2402.09353) at about LoRA's price: y = m/n · (Wx + sBAx), with n = ‖W + sBA‖ of each row of W.

PEFT makes and saves the weights; the arithmetic is ours. Of each row, ‖W + sBA‖² = ‖W‖² + 2s⟨W, BA⟩ + s²‖BA‖², and
neither product on the right needs the matrix BA: ⟨W, BA⟩ is read off WAᵀ, ‖BA‖² off AAᵀ, both as narrow as the rank.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from ftlaunch.recipe.adapter import Dora
from fttrain.adapters.frozen_weights import weight_of, whole
from fttrain.adapters.low_rank import Method as LowRankMethod

TINY = 1e-30
"""Smallest square of a norm: a row of zeros stays finite."""


class Method(LowRankMethod[Dora]):
    """PEFT's DoRA with this arithmetic."""

    options: ClassVar[Mapping[str, Any]] = {"use_dora": True}

    def install(self, model: nn.Module, start: Path | None) -> None:
        install(model, self.name, fresh=start is None)


def install(model: nn.Module, adapter: str, *, fresh: bool) -> None:
    """Put this arithmetic into every DoRA layer of the adapter of that name; `fresh` also sets m = ‖W‖.

    A row of W that is zero has no direction, so it gets one from a row of B; m keeps the row at zero.
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
    """The part of a DoRA layer that a LoRA layer lacks: the lengths m of the rows, and the arithmetic.

    A and B are the layer's own; as this module holds them as well, ZeRO-3 gathers them when it is called.
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
        """Return m/n · (Wx + sBAx) + bias, where `base` is the frozen layer's output and `x` the input of A.

        The result overwrites `base`, or a copy of it if `base` is a view: autograd forbids changing some views.
        """
        if base._is_view():
            base = base.clone()
        ratio_O = self.weight.float() / self._norm(base_layer, x.dtype)
        low = F.linear(x, self.a)
        return _Turned.apply(base, low, ratio_O, self._scale * self.b, self.bias, self._squares_O == 0)

    @torch.no_grad()
    def _norm(self, base_layer: nn.Module, dtype: torch.dtype) -> Tensor:
        """Return n, [out], rounded as m is, so that m/n is exactly 1 at the start."""
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


class _Turned(torch.autograd.Function):
    """ratio·(base + low·Bᵀ) by column, in the place of `base` and in its format; a bias within `base` stays as it is.

    Of all tensors [N, out] the backward pass keeps only the result: what the ratio was multiplied by is result / ratio.
    Where W's row is zero (`lone_O`) that is low·Bᵀ, which needs no division; the same is used where a ratio is zero,
    which training does not reach.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        base, low, ratio_O, b_OR, bias_O, lone_O = given
        low = low.to(base.dtype)
        ratio_b_RO = (ratio_O * b_OR.T).to(base.dtype)
        base.addcmul_(base, (ratio_O - 1).to(base.dtype))
        if bias_O is not None:
            base.sub_((bias_O * (ratio_O - 1)).to(base.dtype))
        base.view(-1, base.shape[-1]).addmm_(low.flatten(0, -2), ratio_b_RO)
        ctx.mark_dirty(base)
        ctx.save_for_backward(base, low, ratio_O, b_OR, bias_O, lone_O)
        return base

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, low, ratio_O, b_OR, bias_O, lone_O = ctx.saved_tensors
        grad_NO, y_NO = grads[0].flatten(0, -2), y.flatten(0, -2)
        towards_base_NO, towards_ratio_O = _turned_back(grad_NO, y_NO, ratio_O, bias_O)
        grad_low_OR = (grad_NO.T @ low.flatten(0, -2)).float()
        lone_O = lone_O | (ratio_O == 0)
        towards_ratio_O = torch.where(lone_O, (grad_low_OR * b_OR).sum(1), towards_ratio_O / ratio_O)
        towards_low_NR = grad_NO @ (ratio_O[:, None] * b_OR).to(y.dtype)
        towards_b_OR = ratio_O[:, None] * grad_low_OR
        return towards_base_NO.view_as(y), towards_low_NR.view_as(low), towards_ratio_O, towards_b_OR, None, None


def _turned_back(grad_NO: Tensor, y_NO: Tensor, ratio_O: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor]:
    """[N, out]: ratio·gradient; [out], in fp32: the sum of gradient·(y - bias)."""
    delta_O = (ratio_O - 1).to(y_NO.dtype)
    turned_NO, sum_O = torch.empty_like(grad_NO), torch.zeros_like(ratio_O)
    rows = ROWS if y_NO.device.type == "cpu" else len(y_NO)
    for grad, y, turned in zip(grad_NO.split(rows), y_NO.split(rows), turned_NO.split(rows), strict=True):
        torch.addcmul(grad, grad, delta_O, out=turned)
        sum_O += (grad * (y if bias_O is None else y - bias_O)).sum(0, dtype=torch.float32)
    return turned_NO, sum_O


class _Variant(DoraLinearVariant):
    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:
        dropped = module.lora_dropout[active_adapter](x)
        return module.lora_magnitude_vector[active_adapter](dropped, result, module.get_base_layer())
