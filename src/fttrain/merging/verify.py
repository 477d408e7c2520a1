"""How like two models are: their logits on probe text, compared where it matters."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from ftlaunch.recipe import Model
from fttrain.distributed.precision import computed_in
from fttrain.hub import adapter_folder
from fttrain.model.scorer import DTYPES, load_base, load_tokenizer
from fttrain.noise import replace_activations
from fttrain.quant import qat
from fttrain.quant.qat import Rounding

PROBES = (
    "The quick brown fox jumps over the lazy dog, and the dog, who had seen it all before, went back to sleep.",
    "name[The Copper Kettle], food[Italian], area[riverside], rating[high]",
    "def area(width, height):\n    return width * height\n\nprint(area(3, 4))",
    "In 1969 two people walked on the Moon while a third kept watch from orbit; they brought back 21.5 kg of rock.",
)
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 2e-2}
QUANTIZED_TOLERANCE = 0.2


@dataclass(frozen=True)
class Likeness:
    """Distance of a model from a reference over all positions of the probes; of a reward model, over their rewards."""

    max_logit_difference: float
    """Of a reward model, of a reward."""
    kl: float
    """Mean KL divergence from the reference, nats a token; of a reward model, of its preferences, nats a pair."""
    top1_agreement: float
    """Share of positions at which both prefer the same token; of pairs of which both prefer the same probe."""
    of: Literal["tokens", "rewards"] = "tokens"
    """What the models say."""

    def __str__(self) -> str:
        if self.of == "rewards":
            return (
                f"max |Δreward| {self.max_logit_difference:.3g}, KL {self.kl:.3g} nats a pair, "
                f"same preference in {self.top1_agreement:.1%} of pairs"
            )
        return (
            f"max |Δlogit| {self.max_logit_difference:.3g}, KL {self.kl:.3g} nats a token, "
            f"same first choice at {self.top1_agreement:.1%} of positions"
        )


@dataclass(frozen=True)
class Reference:
    """The adapter model's word on the probes."""

    logits: list[Tensor]
    """[T, V] of each probe; of a reward model, its reward [1]."""
    probes: list[Tensor]
    dtype: torch.dtype
    quantized: dict[str, str]
    """Formats of the weights that the base holds in few bits, by their keys."""
    rounding: dict[str, tuple[Rounding, Tensor | None]]
    """How weights were rounded in training, with the steps that were learned, by the names of the weights."""
    of: Literal["tokens", "rewards"]


def tolerance(base: Model) -> float:
    """Largest KL that rounding alone explains, by the base's number format."""
    return QUANTIZED_TOLERANCE if base.held_in_few_bits else TOLERANCE[base.dtype]


@torch.no_grad()
def reference(base: Model, adapter: Path, head: Path | None = None) -> Reference:
    """Logits of base + adapter, as they were trained; with the head of a reward model, its rewards."""
    from peft import PeftModel

    tokenizer = load_tokenizer(base.path, base.revision)
    probes = [torch.tensor([tokenizer(text)["input_ids"]]) for text in PROBES]
    dtype = DTYPES[computed_in(base.dtype)]
    plain: Any = load_base(base, dtype=dtype, packing=False)
    quantized = {
        f"{name}.weight": str(base.quantization)
        for name, module in plain.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
    }
    replace_activations.wear(plain, replace_activations.read(adapter))
    model: Any = PeftModel.from_pretrained(plain, str(adapter_folder(adapter))).eval()
    if base.rounding:
        qat.install(model, base.rounding, adapter)
    rounding = qat.roundings(model)
    if head is None:
        logits = [model(probe.to(model.device)).logits[0].float().cpu() for probe in probes]
    else:
        weight = load_file(head)["score.weight"]
        body = model.get_base_model().base_model
        ends = [body(probe.to(model.device)).last_hidden_state[0, -1].float().cpu() for probe in probes]
        logits = [weight @ end for end in ends]
    del model, plain
    gc.collect()
    return Reference(logits, probes, dtype, quantized, rounding, "tokens" if head is None else "rewards")


@torch.no_grad()
def compare(ref: Reference, folder: Path) -> Likeness:
    """Load a model folder as any user would, in the reference's dtype, and compare."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForCausalLM if ref.of == "tokens" else AutoModelForSequenceClassification
    model: Any = kind.from_pretrained(folder, dtype=ref.dtype, use_safetensors=True, trust_remote_code=False).eval()
    qat.follow_card(model, folder)
    ours = [model(probe).logits[0].float() for probe in ref.probes]
    del model
    gc.collect()
    return distance(ref.logits, ours, ref.of)


def distance(reference: list[Tensor], other: list[Tensor], of: Literal["tokens", "rewards"] = "tokens") -> Likeness:
    """How far one model's logits [T, V] (or rewards [1]) of each probe are from the reference's."""
    theirs, ours = torch.cat(reference), torch.cat(other)
    difference = float((theirs - ours).abs().max())
    if of == "rewards":
        ours, theirs = (_preferences(rewards) for rewards in (ours, theirs))
    logp, logq = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    kl = (logp.exp() * (logp - logq)).sum(-1).mean()
    agreement = (theirs.argmax(-1) == ours.argmax(-1)).float().mean()
    return Likeness(difference, float(kl), float(agreement), of)


def _preferences(rewards_P: Tensor) -> Tensor:
    """[pairs of probes, 2]: logits of preferring the one or the other, as Bradley and Terry have it."""
    return torch.combinations(rewards_P)
