"""How like two models are: their logits on probe text, compared where it matters."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftlaunch.recipe import Model
from fttrain.model import DTYPES, load_base, load_tokenizer

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
    """Distance of a model from a reference over all positions of the probes."""

    max_logit_difference: float
    kl: float
    """Mean KL divergence from the reference, nats a token."""
    top1_agreement: float
    """Share of positions at which both prefer the same token."""

    def __str__(self) -> str:
        return (
            f"max |Δlogit| {self.max_logit_difference:.3g}, KL {self.kl:.3g} nats a token, "
            f"same first choice at {self.top1_agreement:.1%} of positions"
        )


@dataclass(frozen=True)
class Reference:
    """The adapter model's word on the probes."""

    logits: list[Tensor]
    probes: list[Tensor]
    dtype: torch.dtype
    quantized: frozenset[str]
    """Keys of weights that the base holds in 4 bits."""


def tolerance(base: Model) -> float:
    """Largest KL that rounding alone explains, by the base's number format."""
    return TOLERANCE[base.dtype] if base.quantization == "none" else QUANTIZED_TOLERANCE


@torch.no_grad()
def reference(base: Model, adapter: Path) -> Reference:
    """Logits of base + adapter, as they were trained."""
    from peft import PeftModel

    tokenizer = load_tokenizer(base.path, base.revision)
    probes = [torch.tensor([tokenizer(text)["input_ids"]]) for text in PROBES]
    dtype = DTYPES[base.dtype]
    plain: Any = load_base(base, dtype=dtype, packing=False)
    quantized = frozenset(
        f"{name}.weight" for name, module in plain.named_modules() if type(module).__name__ == "Linear4bit"
    )
    model: Any = PeftModel.from_pretrained(plain, str(adapter)).eval()
    logits = [model(probe.to(model.device)).logits[0].float().cpu() for probe in probes]
    del model, plain
    gc.collect()
    return Reference(logits, probes, dtype, quantized)


@torch.no_grad()
def compare(ref: Reference, folder: Path) -> Likeness:
    """Load a model folder as any user would, in the reference's dtype, and compare."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=ref.dtype).eval()
    ours = torch.cat([model(probe).logits[0].float() for probe in ref.probes])
    theirs = torch.cat(ref.logits)
    del model
    gc.collect()
    logp, logq = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    kl = (logp.exp() * (logp - logq)).sum(-1).mean()
    agreement = (theirs.argmax(-1) == ours.argmax(-1)).float().mean()
    return Likeness(float((theirs - ours).abs().max()), float(kl), float(agreement))
