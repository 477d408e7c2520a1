"""How far two models are apart: their logits, or rewards, on the same probes."""

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from ftlaunch.recipe.model import Model
from ftlaunch.run.records import Divergence
from fttrain import adapters, hub
from fttrain.distributed.precision import computed_in
from fttrain.merging import deltas, weight_map
from fttrain.merging.deltas import Delta
from fttrain.merging.probes import probes
from fttrain.model.families import auto_class_in
from fttrain.model.packing import forget_lengths
from fttrain.model.scorer import DTYPES, load_base, load_tokenizer
from fttrain.noise import replace_activations
from fttrain.quant import qat
from fttrain.quant.qat import Rounding

TOLERANCE = {"F64": 1e-5, "F32": 1e-5, "F16": 1e-2, "BF16": 2e-2}
"""Largest KL, in nats per token, that rounding to a format explains; formats in safetensors' names."""
COARSEST = 0.2
"""The same for formats of fewer bits."""
WORDS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
NEARER = 0.1
"""The merged model's KL is at most this share of the bare base's."""
EFFECT = 0.8
"""Where rounding hides a small adapter, at least this share of its effect must be in the merged model."""
UNSEEN = 0.01
"""An adapter that moves the base by less than this share of the tolerance cannot be told from rounding."""


@dataclass(frozen=True)
class Reference:
    """The adapter model's logits on the probes, and all that a merge must know of the model."""

    logits: list[Tensor]
    """[T, V] for each probe; of a reward model, its reward [1]."""
    bare: list[Tensor]
    """The same from the base without the adapter."""
    probes: list[Tensor]
    dtype: torch.dtype
    quantized: dict[str, str]
    """Formats of the weights that training held in few bits, by their names."""
    rounding: dict[str, tuple[Rounding, Tensor | None]]
    """How training rounded each weight, with the learned steps, by the names of the weights."""
    added: dict[str, Delta]
    """What the adapter adds to each weight, by name."""
    skeleton: Any
    """The base without weights."""
    of: Literal["tokens", "rewards"]


def tolerance(base: Model, on_disk: Iterable[str]) -> float:
    """Return the largest KL that rounding explains: that of the coarsest format in which weights were held."""
    formats = {WORDS[computed_in(base.dtype)], *on_disk}
    return COARSEST if base.is_quantized else max(TOLERANCE.get(name, COARSEST) for name in formats)


def flaw(found: Divergence, limit: float, *, was_set: bool) -> str | None:
    """Return what is wrong with a merged model; None where it is the adapter model up to rounding.

    Where the user has set the limit, it alone counts.
    """
    if found.kl > limit:
        return f"max_kl is {limit:g}" if was_set else f"rounding explains a KL of {limit:g} at most"
    if was_set:
        return None
    # A merge that lost the adapter is the bare base. If the adapter is small, that too is within the tolerance, so the
    # merged model must also be much nearer to the adapter model than the bare base is, or show the adapter's effect.
    assert found.base_kl is not None
    assert found.effect is not None
    near = found.kl <= NEARER * found.base_kl or abs(found.effect - 1) <= 1 - EFFECT
    if near or found.base_kl <= UNSEEN * limit:
        return None
    return f"the bare base is about as near, at a KL of {found.base_kl:.3g}, so the adapter is not in it"


@torch.no_grad()
def reference(base: Model, adapter: Path, head: Path | None = None) -> Reference:
    """Return the logits of base and adapter, as they were trained; with the head of a reward model, its rewards."""
    tokenizer = load_tokenizer(base.path, base.revision)
    inputs = probes(tokenizer, adapter)
    dtype = DTYPES[computed_in(base.dtype)]
    plain: Any = load_base(base, dtype=dtype, packing=False)
    quantized = {
        f"{name}.weight": str(base.quantization)
        for name, module in plain.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
    }
    replace_activations.install(plain, replace_activations.read(adapter))
    # The bare base is measured before PEFT wraps its modules, and the skeleton is made from it for the same reason.
    weight = None if head is None else load_file(head)["score.weight"]
    bare = _said(plain.eval(), inputs, weight)
    skeleton = weight_map.skeleton(plain)
    model: Any = adapters.with_saved(plain, adapter).eval()
    if base.rounding:
        qat.install(model, base.rounding, adapter)
    rounding = qat.roundings(model)
    logits = _said(model, inputs, weight)
    added = deltas.deltas(model, adapters.TRAINED)
    del model, plain  # the merged model is loaded next, and both need not fit in memory
    gc.collect()
    of = "tokens" if head is None else "rewards"
    return Reference(logits, bare, inputs, dtype, quantized, rounding, added, skeleton, of)


def _said(model: Any, inputs: Sequence[Tensor], head_1D: Tensor | None) -> list[Tensor]:
    """Return the logits [T, V] of each probe or, through the head of a reward model, its reward [1]."""
    if head_1D is None:
        return [model(probe.to(model.device)).logits[0].float().cpu() for probe in inputs]
    body = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
    return [head_1D @ body(probe.to(model.device)).last_hidden_state[0, -1].float().cpu() for probe in inputs]


@torch.no_grad()
def compare(ref: Reference, folder: Path) -> Divergence:
    """Load a model folder as any user would, in the reference's number format, and compare."""
    from transformers import AutoModelForSequenceClassification

    folder = hub.model_folder(str(folder.absolute()))
    kind: Any = auto_class_in(folder)[0] if ref.of == "tokens" else AutoModelForSequenceClassification
    model: Any = kind.from_pretrained(folder, dtype=ref.dtype, use_safetensors=True, trust_remote_code=False).eval()
    model.config.use_cache = False  # a decoder of BART's kind makes one of too few layers
    qat.follow_card(model, folder)
    forget_lengths(model)
    ours = [model(probe).logits[0].float() for probe in ref.probes]
    del model
    gc.collect()
    return distance(ref.logits, ours, ref.of, bare=ref.bare)


def distance(
    reference: list[Tensor],
    other: list[Tensor],
    of: Literal["tokens", "rewards"] = "tokens",
    bare: list[Tensor] | None = None,
) -> Divergence:
    """Return how far one model's logits [T, V] (or rewards [1]) of each probe are from the reference's.

    `bare` are those of the base without the adapter, by which the adapter's effect is measured.
    """
    difference = max(float((theirs - ours).abs().max()) for theirs, ours in zip(reference, other, strict=True))
    models = [reference, other, reference if bare is None else bare]
    if of == "rewards":
        models = [[_preferences(torch.cat(rewards))] for rewards in models]
    sums, count = torch.zeros(5, dtype=torch.float64), 0
    for said in zip(*models, strict=True):
        logp, logq, logb = (logits.double().log_softmax(-1) for logits in said)
        agrees = logp.argmax(-1) == logq.argmax(-1)
        kl, base_kl = ((logp.exp() * (logp - one)).sum() for one in (logq, logb))
        # The effect is the projection of what the merged model changes on what the adapter changes: a number that
        # rounding, which points anywhere, hardly moves.
        moved, wanted = logq - logb, logp - logb
        sums += torch.stack([kl, base_kl, agrees.sum(), (moved * wanted).sum(), wanted.square().sum()])
        count += agrees.numel()
    kl, base_kl, agree, projected, wanted = sums.tolist()
    told = {} if bare is None else {"base_kl": base_kl / count, "effect": projected / wanted if wanted else 1.0}
    return Divergence(difference, kl / count, agree / count, of, **told)


def _preferences(rewards_P: Tensor) -> Tensor:
    """Return [pairs of probes, 2]: logits of preferring the one or the other, by Bradley and Terry's model."""
    return torch.combinations(rewards_P)
