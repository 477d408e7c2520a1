"""AdaLoRA (arXiv 2303.10512): W + s·PΛQ, whose triplets (a column of P, a λ, a row of Q) are pruned where they matter
least, until the ranks of all layers together keep to a budget.

P and Q are kept near orthogonal by the gradient of γ‖QQᵀ - I‖ (and of PᵀP), which is added where they are used. The
artifact is a plain LoRA adapter, in which every layer has its own rank and λ is part of B.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from ftlaunch.recipe.adapter import Adalora
from fttrain.adapters.low_rank import Method as LowRankMethod


class Triplets(nn.Module):
    """P, Λ and Q of one layer. P and Q are the layer's own B and A, held here too, as in `Magnitude`."""

    def __init__(self, layer: Any, adapter: str, scale: float) -> None:
        super().__init__()
        self.q: nn.Parameter = layer.lora_A[adapter].weight
        self.p: nn.Parameter = layer.lora_B[adapter].weight
        # λ begins at 0, so that the adapted layer begins as the plain one; P and Q begin random, or λ would get no
        # gradient.
        self.lambdas = nn.Parameter(torch.zeros_like(self.q[:, 0]))
        self.rank = len(self.q)  # later ZeRO-3 may leave an empty shard of it
        self.scale = scale
        self.pull = 0.0
        """γ of one backward pass through this layer."""

    def forward(self, x: Tensor) -> Tensor:
        q_RI, p_RO = _Orthogonal.apply(self.q, self.pull), _Orthogonal.apply(self.p.T, self.pull)
        return F.linear(F.linear(x, q_RI) * (self.scale * self.lambdas).to(x.dtype), p_RO.T)


class _Orthogonal(torch.autograd.Function):
    """The identity; its backward pass adds the gradient of pull·‖rows·rowsᵀ - I‖ (Frobenius norm)."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, pull: float) -> Tensor:
        ctx.save_for_backward(rows_RD)
        ctx.pull = pull
        return rows_RD.view_as(rows_RD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows_RD,) = ctx.saved_tensors
        if not ctx.pull:
            return grads[0], None
        rows_RD = rows_RD.float()
        gram_RR = rows_RD @ rows_RD.T - torch.eye(len(rows_RD), device=rows_RD.device)
        towards_RD = 2 * gram_RR @ rows_RD / gram_RR.norm().clamp(min=1e-12)
        return grads[0] + (ctx.pull * towards_RD).to(grads[0].dtype), None


class _Variant(LoraVariant):
    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:
        return result + module.adalora(module.lora_dropout[active_adapter](x)).to(result.dtype)


class RankAllocator:
    """Decides after each optimizer step which triplets stay. All ranks hold one and compute the same."""

    def __init__(self, model: nn.Module, spec: Adalora, num_steps: int) -> None:
        parts = {name: part for name, part in model.named_modules() if isinstance(part, Triplets)}
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._names = {name: [names[part.lambdas], names[part.q], names[part.p]] for name, part in parts.items()}
        self._spec = spec
        self._first = int(spec.prune_after * num_steps)
        self._last = int(spec.prune_until * num_steps)
        self._every = spec.prune_every or max(1, (self._last - self._first) // 50)
        self._keep = {name: torch.ones(part.rank, dtype=torch.bool) for name, part in parts.items()}
        self._begun = sum(map(len, self._keep.values()))
        self._target = min(self._begun, spec.rank * len(parts))
        self._mean: dict[str, Tensor] = {}
        self._spread: dict[str, Tensor] = {}
        self._steps = 0

    @property
    def watched(self) -> list[str]:
        """Names of the weights whose gradients it wants."""
        return [name for names in self._names.values() for name in names]

    def update(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what each λ must be set to after a step, by name, given the new weights and the step's gradients."""
        self._steps += 1
        # After the last pruning scores are not needed; what stays is fixed to the end.
        if self._steps <= self._last:
            for name, gradient in gradients.items():
                self._note(name, (weights[name] * gradient).abs())
        if self._first < self._steps <= self._last and (self._steps % self._every == 0 or self._steps == self._last):
            self._choose(self.budget(self._steps))
        elif self._steps < self._last:
            return {}
        lambdas = {name: names[0] for name, names in self._names.items()}
        return {key: weights[key] * self._keep[name].to(weights[key]) for name, key in lambdas.items()}

    def _note(self, name: str, importance: Tensor) -> None:
        """Update the running means of importance and of its deviation from the mean (eq. 9 and 10 of the paper)."""
        zero = torch.zeros_like(importance)
        mean, spread = (kept.get(name, zero).to(zero.device) for kept in (self._mean, self._spread))
        self._mean[name] = mean = self._spec.beta1 * mean + (1 - self._spec.beta1) * importance
        self._spread[name] = self._spec.beta2 * spread + (1 - self._spec.beta2) * (importance - mean).abs()

    def budget(self, step: int) -> int:
        """Return how many triplets may stay after a step: the number falls with the third power (eq. 12)."""
        if step >= self._last:
            return self._target
        left = 1 - max(0, step - self._first) / max(1, self._last - self._first)
        return int(self._target + (self._begun - self._target) * left**3)

    def _choose(self, budget: int) -> None:
        """Keep the triplets that matter most: a λ's score and the mean scores of its row and column (eq. 7)."""
        scores = {name: self._score(*names) for name, names in self._names.items()}
        best = torch.cat([*scores.values()]).topk(budget).indices
        kept = torch.zeros(self._begun, dtype=torch.bool)
        kept[best.cpu()] = True
        sizes = [len(keep) for keep in self._keep.values()]
        self._keep = dict(zip(self._keep, kept.split(sizes), strict=True))

    def _score(self, lambdas: str, q: str, p: str) -> Tensor:
        of_lambdas, of_q, of_p = (self._mean[name] * self._spread[name] for name in (lambdas, q, p))
        return of_lambdas + of_q.mean(1) + of_p.mean(0)

    def measures(self) -> dict[str, float]:
        """Ranks of the layers as they now are."""
        ranks = [int(keep.sum()) for keep in self._keep.values()]
        return {"rank/mean": sum(ranks) / len(ranks), "rank/least": float(min(ranks)), "rank/most": float(max(ranks))}

    def state_dict(self) -> dict[str, Tensor]:
        """Return counters, kept triplets and running means, as `Stateful` wants."""
        nothing = torch.zeros(1)  # stands for means that do not exist yet, so that a checkpoint's keys never change
        return {
            "steps": torch.tensor(self._steps),
            **{f"keep|{name}": keep for name, keep in self._keep.items()},
            **{f"mean|{name}": self._mean.get(name, nothing) for name in self.watched},
            **{f"spread|{name}": self._spread.get(name, nothing) for name in self.watched},
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self._steps = int(tensors["steps"])
        self._keep = {name: tensors[f"keep|{name}"] for name in self._keep}
        if self._steps:
            self._mean = {name: tensors[f"mean|{name}"] for name in self.watched}
            self._spread = {name: tensors[f"spread|{name}"] for name in self.watched}


class Method(LowRankMethod[Adalora]):
    """Triplets, of which an allocator tells which stay."""

    def install(self, model: nn.Module, start: Path | None) -> None:
        """Make every LoRA layer one of triplets: new ones, or those that a plain LoRA adapter stands for."""
        layers = list(self.layers(model))
        for _, layer in layers:
            triplets = Triplets(layer, self.name, layer.scaling[self.name])
            # Divided as the paper's penalty is averaged over the matrices, of which each layer has two, and over
            # micro-batches.
            triplets.pull = self.adapter.orthogonality / (2 * len(layers) * self.accumulation)
            with torch.no_grad():
                if start is None:
                    nn.init.normal_(triplets.q, std=0.02)
                    nn.init.normal_(triplets.p, std=0.02)
                else:
                    # A plain adapter is B·A: the length of each column of B becomes its λ, and the product stays the
                    # same.
                    triplets.lambdas.copy_(triplets.p.norm(dim=0))
                    triplets.p.div_(triplets.lambdas.clamp(min=1e-12))
            layer.add_module("adalora", triplets)
            layer.lora_variant[self.name] = _Variant()

    def as_plain_lora(self, model: nn.Module, weights: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
        """The trained weights as a LoRA adapter whose layers have ranks of their own; the config is changed to say so.

        A layer whose λ are all zero has no part in it.
        """
        plain: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        for name, _ in self.layers(model):
            key_a, key_b = self.keys(name)
            lambdas_R = weights[f"{name}.adalora.lambdas"]
            kept = lambdas_R != 0
            if kept.any():
                ranks[name.removeprefix("base_model.model.")] = int(kept.sum())
                plain[key_a] = weights[key_a][kept]
                plain[key_b] = (weights[key_b] * lambdas_R)[:, kept]
        # PEFT scales a layer by alpha / rank: with a rank of its own each layer needs an alpha of its own.
        scale = config.lora_alpha / config.r
        config.target_modules = sorted(ranks)
        config.rank_pattern = ranks  # type: ignore[assignment]
        config.alpha_pattern = {name: scale * rank for name, rank in ranks.items()}  # type: ignore[assignment]
        return plain

    def state(self, model: nn.Module, num_steps: int) -> RankAllocator:
        return RankAllocator(model, self.adapter, num_steps)
