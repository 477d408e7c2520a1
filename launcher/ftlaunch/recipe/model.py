"""The vocabulary of [model]: the base, and how its weights are held."""

from collections.abc import Mapping
from typing import Annotated, Literal

from msgspec import Meta

from ftlaunch.recipe.types import Kind, ModelName, Positive, Table, Text

Dtype = Literal["auto", "bf16", "fp16", "fp32"]
"""Number formats, and leaving the choice to the device."""


FewBits = Literal["none", "nf4", "fp4", "int8"]
"""How frozen weights are held."""
LARGEST_REST = 0.2
"""Share of the body's weights that may stay in 16 bits where few are asked for."""


class Qat(Kind, frozen=True, kw_only=True):
    """Quantization-aware training: layers compute with weights rounded to integers, and gradients pass straight through
    (arXiv 1712.05877). With an adapter it is W + scale·BA that is rounded. What is left is the rounded model."""

    bits: Annotated[int, Meta(ge=2, le=8)] = 4
    """Bits of an integer."""
    symmetric: bool = True
    """Signed integers around 0; else unsigned ones with a zero point."""
    granularity: Literal["tensor", "channel", "group"] = "channel"
    """What shares one scale: a matrix, an output channel of it, or `group_size` weights of a channel."""
    group_size: Positive = 64
    """Weights in a group; it divides the inputs of every layer."""
    learned_step: bool = False
    """Train the scales, too (LSQ, arXiv 1902.08153), instead of spanning the weights' range. Symmetric only."""


# The class's name would give the tag "bit_linear".
class BitLinear(Kind, frozen=True, kw_only=True, tag="bitlinear"):
    """BitNet b1.58: weights of -1, 0 and 1 times their mean magnitude, inputs in 8 bits by each token's largest
    (arXiv 2402.17764). A model that was not trained so loses much and needs many steps to recover."""

    rms_norm: bool = False
    """Norm the inputs of each layer first, as BitNet does; for models trained so from the start."""


class Model(Table, frozen=True, kw_only=True):
    """The base model and the number format it is held in."""

    path: ModelName
    """Hub id (OWNER/NAME), or folder with safetensors (./DIR), into which `ftlaunch import` turns a .gguf file."""
    revision: Text | None = None
    """Commit, tag or branch of a hub id. None is the hub's main branch."""
    allow_pickle: bool = False
    """Load pickled weights (pytorch_model.bin) where there are no others. Only for a hub id with `revision` = a full
    commit: a pickle can run code, and a branch can change."""
    dtype: Dtype = "auto"
    """Format of the frozen weights and of the arithmetic. Trained weights always keep an fp32 master copy.
    "auto" is "bf16" where the device computes it natively (a GPU of capability 8 or more, a CPU with AVX512-BF16 or
    AMX), else "fp16" on a GPU and "fp32" on a CPU. It is decided where the stage runs, and kept to its end."""
    # A word, or a table of its own: quantization = "nf4", or [model.quantization] with kind = "qat".
    quantization: FewBits | Qat | BitLinear = "none"
    """"nf4" holds the frozen weights in 4 bits with double quantization (QLoRA, arXiv 2305.14314); "fp4" has another
    table of levels; "int8" is LLM.int8, with inputs in 8 bits but for the largest (arXiv 2208.07339). A table of kind
    "qat" or "bitlinear" trains through rounded weights instead."""

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are frozen in few bits; those that are trained through rounding are not."""
        return isinstance(self.quantization, str) and self.quantization != "none"

    @property
    def rounding(self) -> Qat | BitLinear | None:
        """How layers round their weights in training, if they do."""
        return None if isinstance(self.quantization, str) else self.quantization


def dropout_in(config: Mapping[str, object]) -> str:
    """Return the rates of dropout in a model's config, which training mode turns on, as text; empty without any."""
    # Heads of classifiers, which transformers keeps next to the rest, are not trained here.
    heads = ("classifier", "summary")
    named = {name: value for name, value in config.items() if "drop" in name and not name.startswith(heads)}
    rates = {name: value for name, value in named.items() if isinstance(value, float) and 0 < value <= 1}
    return ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
