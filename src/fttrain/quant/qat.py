"""Training through rounding: layers compute with rounded weights, and gradients pass as if nothing had been rounded.

The effective weight is rounded: W, or W + scale·B·A where a LoRA adapter is trained. So the merged model, rounded once,
is the model that was trained. Every linear layer but the output head takes part.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ftlaunch.recipe.model import BitLinear, Qat
from fttrain.quant import grid as grids
from fttrain.quant.calibrate import min_max
from fttrain.quant.grid import Grid, Steps
from fttrain.quant.ternary import absmean, ternary

STEP = "log_step"
STEPS_FILE = "rounding_steps.safetensors"
"""Next to an adapter: the logarithms of the steps that were learned with it, by the names of weights."""
CARD = "rounding.json"
"""Next to a whole model: how its layers rounded in training. Its weights are rounded already; its inputs are not."""
PREFIX = "base_model.model."
INPUT_GRID = Grid(8)
SMALLEST_INPUT = 1e-5
EPS = 1e-6


@dataclass(frozen=True)
class Rounding:
    """How one layer rounds."""

    spec: Qat | BitLinear
    transposed: bool
    """Whether the layer stores its weight as [inputs, outputs]."""

    def matrix(self, weight_OI: Tensor, log_step_G: Tensor | None) -> Tensor:
        """Return [outputs, inputs] in fp32: the rounded weight, with the gradient of the weight itself."""
        if isinstance(self.spec, BitLinear):
            gamma = absmean(weight_OI)
            return _straight_through(ternary(weight_OI, gamma) * gamma, weight_OI)
        grid = Grid(self.spec.bits, self.spec.symmetric)
        values = grids.blocks(weight_OI, self.spec.granularity, self.spec.group_size)
        if log_step_G is not None:
            return _learned(values, log_step_G, grid).reshape(weight_OI.shape)
        at = grids.steps(*min_max([values.detach()], grid), grid)
        rounded = grids.dequantize(grids.quantize(values, at, grid), at)
        return _straight_through(rounded, values).reshape(weight_OI.shape)

    def first_step(self, weight_OI: Tensor) -> Tensor | None:
        """Return [G]: where the logarithm of the learned step starts, 2·mean|W| / √q_max (LSQ); None without one."""
        if isinstance(self.spec, BitLinear) or not self.spec.learned_step:
            return None
        highest = Grid(self.spec.bits).highest
        values = grids.blocks(weight_OI, self.spec.granularity, self.spec.group_size)
        return (2 * values.abs().mean(1) / highest**0.5).clamp(min=grids.SMALLEST_SCALE).log()

    def inputs(self, x: Tensor) -> Tensor:
        """Return `x` […, inputs] as the layer sees it: BitLinear norms it on request and rounds tokens to 8 bits."""
        if not isinstance(self.spec, BitLinear):
            return x
        seen = x.float()
        if self.spec.rms_norm:
            seen = seen * torch.rsqrt(seen.square().mean(-1, keepdim=True) + EPS)
        scale = seen.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_INPUT) / INPUT_GRID.highest
        at = Steps(scale, torch.zeros_like(scale))
        rounded = grids.dequantize(grids.quantize(seen, at, INPUT_GRID), at)
        return _straight_through(rounded, seen).to(x.dtype)

    @torch.no_grad()
    def stored(self, weight: Tensor, log_step_G: Tensor | None) -> Tensor:
        """Return the rounded weight in fp32; both are [outputs, inputs], or transposed as the layer stores it."""
        matrix = self.matrix((weight.T if self.transposed else weight).float(), log_step_G)
        return matrix.T if self.transposed else matrix


def _straight_through(rounded: Tensor, exact: Tensor) -> Tensor:
    """Return `rounded`, exact to the last bit, with the gradient of `exact`; both have one shape."""
    # The bracket is exactly 0 in value. The usual exact + (rounded - exact).detach() rounds once more in floats.
    return rounded.detach() + (exact - exact.detach())


def _learned(values_GN: Tensor, log_step_G: Tensor, grid: Grid) -> Tensor:
    """Rounding by a step that is learned (LSQ, arXiv 1902.08153), with its gradient scaled by 1 / √(N · q_max).

    The step is held as a logarithm, so that an optimizer step changes it by a share of itself, whatever its size.
    """
    # The value is log_step's own; only a share of its gradient flows, the rest goes through a detached copy.
    share = (values_GN.shape[1] * grid.highest) ** -0.5
    log_step = log_step_G.float() * share + (log_step_G.float() * (1 - share)).detach()
    step = log_step.exp()[:, None]
    inside = (values_GN / step).clamp(grid.lowest, grid.highest)
    return _straight_through(inside.round(), inside) * step


def install(model: nn.Module, spec: Qat | BitLinear, start: Path | None = None) -> None:
    """Have every linear layer but the output head round from now on; its weights keep their names.

    Learned steps start from the weights as they are, or from those in the artifact folder `start`.
    """
    file = start / STEPS_FILE if start else None
    steps = load_file(file) if file and file.exists() else {}
    for name, layer in layers(model):
        rounding = Rounding(spec, type(_plain(layer)).__name__ == "Conv1D")
        layer.rounding = rounding
        first = steps.get(f"{name}.weight", rounding.first_step(_effective(layer).detach()))
        if first is not None:
            trained = any(parameter.requires_grad for parameter in layer.parameters())
            layer.register_parameter(STEP, nn.Parameter(first.to(_plain(layer).weight.device), requires_grad=trained))
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]


def take_steps(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the learned steps out of trained weights; return them by the names of the weights that they round."""
    names = [name for name in weights if name.endswith(f".{STEP}")]
    return {f"{name.removeprefix(PREFIX).removesuffix(STEP)}weight": weights.pop(name) for name in names}


def leave_card(folder: Path, spec: Qat | BitLinear) -> None:
    """Say in a folder with rounded weights how their layers rounded."""
    (folder / CARD).write_bytes(msgspec.json.encode(spec))


def follow_card(model: nn.Module, folder: Path) -> None:
    """Have a model with rounded weights see its inputs as in training, if its folder says that they were rounded."""
    if (folder / CARD).exists():
        round_inputs(model, msgspec.json.decode((folder / CARD).read_bytes(), type=Qat | BitLinear))


def round_inputs(model: nn.Module, spec: Qat | BitLinear) -> None:
    """Have the layers of a model whose weights are rounded already see their inputs as in training."""
    for _, layer in layers(model):
        rounding = Rounding(spec, transposed=False)
        layer.register_forward_pre_hook(lambda _module, inputs, r=rounding: (r.inputs(inputs[0]), *inputs[1:]))


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The linear layers that take part, with their names in the model as transformers loads it."""
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    head = causal.get_output_embeddings()
    inside: set[nn.Module] = {head}
    for name, module in causal.named_modules():
        if module in inside:
            continue
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            inside.update(module.modules())  # base and A and B inside the wrapper must not round by themselves
            if isinstance(module.base_layer, nn.Embedding) or module.base_layer is head:
                continue
            yield name, module
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            yield name, module


def roundings(model: nn.Module) -> dict[str, tuple[Rounding, Tensor | None]]:
    """How each layer rounds, with its learned step, by the name of its weight as transformers loads the model."""
    return {
        f"{name}.weight": (layer.rounding, getattr(layer, STEP, None))
        for name, layer in layers(model)
        if hasattr(layer, "rounding")
    }


def _plain(layer: Any) -> Any:
    """The layer that holds the weight, under PEFT's wrapper if there is one."""
    return getattr(layer, "base_layer", layer)


def _effective(layer: Any) -> Tensor:
    """Return [outputs, inputs] in fp32: the weight with the active adapters added."""
    plain = _plain(layer)
    weight = plain.weight if isinstance(plain, nn.Linear) else plain.weight.T
    matrix = weight.float()
    if plain is layer or layer.disable_adapters:
        return matrix
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float()
            matrix = matrix + layer.scaling[name] * (b @ a)
    return matrix


def _forward(layer: Any, x: Tensor) -> Tensor:
    plain = _plain(layer)
    with torch.autocast(x.device.type, enabled=False):  # the merge computes in fp32, too
        weight = layer.rounding.matrix(_effective(layer), getattr(layer, STEP, None))
        seen = layer.rounding.inputs(x)
    bias = None if plain.bias is None else plain.bias.to(x.dtype)
    return F.linear(seen, weight.to(x.dtype), bias)
