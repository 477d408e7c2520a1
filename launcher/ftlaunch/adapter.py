"""The vocabulary of [adapter]: one struct a kind, each with the keys that it alone understands."""

from typing import Annotated

from msgspec import Meta, Struct

from ftlaunch.bounds import Above0, Fraction, NonNegative, Positive, Text

SUPER_WEIGHTS = "super-weights"
LAYERS = r"^((top|every):[1-9][0-9]*|super-weights)$"


class LowRank(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all adapters have that add a product of two narrow matrices to frozen weights."""

    rank: Positive = 8
    """Inner width of the adapter."""
    alpha: Above0 = 16
    """Numerator of the scale: alpha / rank, with "rslora" alpha / √rank."""
    dropout: Fraction = 0.0
    """Probability of zeroing an element of the adapter's input, in training only."""
    targets: Text | list[Text] = "all-linear"
    """"all-linear" (every linear layer but the output head), a list of module names, or one regular expression, which
    must match a module's whole name."""
    layers: list[NonNegative] | Annotated[str, Meta(pattern=LAYERS)] | None = None
    """Layers that are adapted: their numbers from 0, "top:8" for the eight next to the output, "every:4" for the last
    of every four, or "super-weights" for those in which `ftlaunch superweights` finds one. None: all. Nothing is
    computed backwards below the lowest of them, so "top" saves time."""

    @property
    def scale(self) -> float:
        """What the product B·A counts with."""
        return self.alpha / self.rank


class Lora(LowRank, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="lora"):
    """Low-rank adapters beside frozen weights: y = Wx + (alpha / rank)·B(A(x)) (arXiv 2106.09685)."""


class Rslora(LowRank, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="rslora"):
    """LoRA with the scale alpha / √rank, under which large ranks learn as fast as small ones (arXiv 2312.03732)."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank**0.5


class Dora(LowRank, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="dora"):
    """LoRA that trains length and direction of each row of a weight apart: W' = m·(W + BA) / ‖W + BA‖
    (arXiv 2402.09353)."""


class Pissa(LowRank, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="pissa"):
    """LoRA that starts from the principal part of each weight instead of zero, with the rest of it frozen
    (arXiv 2404.02948). The artifact is a plain LoRA adapter of twice the rank, on the unchanged base."""

    svd_iterations: Positive | None = None
    """Power iterations of a randomized decomposition, much quicker on large weights; 16 is plenty. None: the exact
    one."""


class Full(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="full"):
    """Full fine-tuning: no adapter, every weight of the model is trained."""


Adapter = Lora | Rslora | Dora | Pissa | Full
