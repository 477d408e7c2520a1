"""Whether what training computes is what plain transformers computes row by row: log-probabilities and gradients."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ftlaunch.recipe.model import Model
from fttrain import adapters
from fttrain.data.batches import collate
from fttrain.data.token_set import Group, Tokens
from fttrain.model.families import auto_class_in
from fttrain.model.scorer import Scorer, load_base

CPU = torch.device("cpu")
LOGPS, NORM = 1e-4, 1e-3
"""What counts as the same: Δ log p of any token in nats, and the gradient's norm relative to its own."""


MERGED = 1e-5
"""How far a logit of a merged model may be from the adapter model's, where the model's own rounding is not more."""


@dataclass(frozen=True)
class Measured:
    """Of all trained tokens, in order."""

    logps_N: torch.Tensor
    grad_norm: float

    def is_same(self, other: "Measured") -> bool:
        near = abs(self.grad_norm - other.grad_norm) <= NORM * other.grad_norm
        return near and float((self.logps_N - other.logps_N).abs().max()) <= LOGPS


def rows() -> list[Tokens]:
    """Rows that are longer and shorter than a window."""
    draw = np.random.default_rng(0)
    return [(draw.integers(3, 250, n).astype(np.int32), np.arange(n) > 1) for n in (40, 23, 61, 9)]


def pairs() -> list[Group]:
    """Pairs of rows that begin alike, for longer than a window and hardly at all."""
    draw = np.random.default_rng(1)
    groups = []
    for prompt, first, second in ((30, 5, 9), (3, 1, 12)):
        begin = draw.integers(3, 250, prompt)
        ends = [np.append(token, draw.integers(3, 250, size)) for token, size in ((1, first), (2, second))]
        ids = [np.concatenate([begin, end]).astype(np.int32) for end in ends]
        groups.append(Group(tuple((one, np.arange(len(one)) >= prompt) for one in ids)))
    return groups


def plain(folder: Path, of: list[Tokens]) -> Measured:
    """By the library's own forward, row by row."""
    model: Any = auto_class_in(folder)[0].from_pretrained(folder, dtype=torch.float32).train()
    types = {"token_type_ids": True} if model.config.model_type == "gemma3" else {}
    logps = []
    for ids, trained in of:
        ids_1T = torch.from_numpy(ids.astype(np.int64))[None]
        logits_TV = model(input_ids=ids_1T, use_cache=False, **dict.fromkeys(types, 0 * ids_1T)).logits[0, :-1]
        logps_T = logits_TV.float().log_softmax(-1).gather(1, ids_1T[0, 1:, None])[:, 0]
        logps.append(logps_T[torch.from_numpy(trained[1:])])
        (-logps[-1].sum()).backward()
    return Measured(torch.cat(logps).detach(), _norm(model))


def trained(folder: Path, groups: list[Group], *, packing: bool, share: bool = False, alone: bool = False) -> Measured:
    """By what training runs. Raises UserError where the model refuses to be laid out so."""
    model = load_base(Model(path=str(folder), dtype="fp32"), dtype=torch.float32, packing=packing).train()
    scorer = Scorer(model.requires_grad_(True))
    if alone:
        scorer.compute_alone()
    scores = scorer(collate(groups, packing=packing, share=share, chunks=1, device=CPU))
    (-scores.smoothed_N.sum()).backward()
    return Measured(scores.logps_N, _norm(model))


def _norm(model: torch.nn.Module) -> float:
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


class _InDouble(TorchFunctionMode):
    """Within, a model in fp64 computes in fp64 where its code says fp32, as norms and softmax do."""

    def __enter__(self) -> Any:
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        torch.set_default_dtype(torch.float32)
        super().__exit__(*raised)

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        given = [_wide(one) for one in args]
        return func(*given, **{name: _wide(one) for name, one in (kwargs or {}).items()})


def _wide(given: Any) -> Any:
    return torch.float64 if given is torch.float32 else given


@torch.no_grad()
def apart(base: Path, adapter: Path, merged: Path) -> tuple[float, float]:
    """Return max |Δlogit| of a merged model from the adapter model, both in fp64, and how far fp32 moves the two."""
    plain = [
        load_base(Model(path=str(folder), dtype="fp32"), dtype=torch.float32, packing=False)
        for folder in (base, merged)
    ]
    models: list[Any] = [adapters.with_saved(plain[0], adapter).eval(), plain[1].eval()]
    ids_1T = torch.from_numpy(rows()[0][0].astype(np.int64))[None]
    in_fp32 = [model(ids_1T).logits for model in models]
    for part in [part for one in plain for part in one.double().modules() if isinstance(part, PreTrainedModel)]:
        if part._can_set_experts_implementation():
            part.set_experts_implementation("eager")  # the default has no fp64
    with _InDouble():
        in_fp64 = [model(ids_1T).logits for model in models]
    moved = sum(float((one - other).abs().max()) for one, other in zip(in_fp32, in_fp64, strict=True))
    return float((in_fp64[0] - in_fp64[1]).abs().max()), moved
