"""The vocabulary of [adapter]: one struct a kind, each with the keys that it alone understands."""

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from ftlaunch.recipe.types import Above0, AtLeast0, Fraction, Kind, NonNegative, Positive, Text

SUPER_WEIGHTS = "super-weights"
# msgspec looks for a pattern anywhere in a text: the anchors make this one a rule for the whole of it.
LAYERS = r"^((top|every):[1-9][0-9]*|super-weights)$"
LAYERS_SAID = '"super-weights", "top:8" or "every:4", with any number of layers'


class _Method(Kind, frozen=True, kw_only=True):
    """What is true of every kind."""

    # msgspec makes no field of a ClassVar, so no recipe can set these.
    label: ClassVar[str]
    """The field's name for it."""
    rate: ClassVar[float]
    """Peak learning rate that suits it, in relation to LoRA's."""
    begins_as_base: ClassVar[bool] = False
    """Whether the model computes what its base does before the first step."""
    takes_loss_scaling: ClassVar[bool] = True
    """Whether it can be trained in fp16, where losses are scaled by a factor that changes."""


class LowRank(_Method, frozen=True, kw_only=True):
    """What all adapters have that add a product of two narrow matrices to frozen weights."""

    # The product is 0 at first: B, or AdaLoRA's singular values, begin as zeros.
    begins_as_base: ClassVar[bool] = True
    is_plain: ClassVar[bool] = False
    """Whether it is W + scale·BA and no more, as stacked experts, embeddings, rounded weights and vLLM want it."""
    scale_formula: ClassVar[str] = "alpha / rank"

    rank: Positive = 8
    """Inner width of the adapter."""
    alpha: Above0 = 16
    """Numerator of the scale: alpha / rank, with "rslora" alpha / √rank."""
    dropout: Fraction = 0.0
    """Probability of zeroing an element of the adapter's input, in training only."""
    targets: Text | list[Text] = "all-linear"
    """"all-linear" (every linear layer of the text body), a list of module names, or one regular expression, which
    must match a module's whole name. Vision towers, and what chooses experts or tokens, are never adapted."""
    layers: list[NonNegative] | Annotated[str, Meta(pattern=LAYERS, description=LAYERS_SAID)] | None = None
    """Layers that are adapted: their numbers from 0, "top:8" for the eight next to the output, "every:4" for the last
    of every four, or "super-weights" for those in which `ftlaunch superweights` finds one. None: all. Nothing is
    computed backwards below the lowest of them, so "top" saves time."""
    experts: bool = False
    """Adapt the experts of a mixture-of-experts model too: those of `layers`, each with an A and a B of its own.
    "lora" and "rslora" do it, without dropout. Most of such a model's weights are in its experts."""

    @property
    def first_rank(self) -> int:
        """Rank of every layer at first."""
        return self.rank

    @property
    def scale(self) -> float:
        """What the product B·A counts with."""
        # Not the rank that a layer has left: each pruning of AdaLoRA would change the scale of what remains.
        return self.alpha / self.first_rank


class Lora(LowRank, frozen=True, kw_only=True):
    """Low-rank adapters on frozen weights: y = Wx + (alpha / rank)·B(A(x)) (arXiv 2106.09685)."""

    label: ClassVar[str] = "LoRA"
    rate: ClassVar[float] = 1
    is_plain: ClassVar[bool] = True


class Rslora(LowRank, frozen=True, kw_only=True):
    """LoRA with the scale alpha / √rank, under which large ranks learn as fast as small ones (arXiv 2312.03732)."""

    label: ClassVar[str] = "rsLoRA"
    rate: ClassVar[float] = 0.5
    is_plain: ClassVar[bool] = True
    scale_formula: ClassVar[str] = "alpha / √rank"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank**0.5


class Dora(LowRank, frozen=True, kw_only=True):
    """LoRA that trains length and direction of each row of a weight apart: W' = m·(W + BA) / ‖W + BA‖
    (arXiv 2402.09353)."""

    label: ClassVar[str] = "DoRA"
    rate: ClassVar[float] = 1


class Pissa(LowRank, frozen=True, kw_only=True):
    """LoRA that starts from the principal part of each weight instead of zero, with the rest of it frozen
    (arXiv 2404.02948). The artifact is a plain LoRA adapter of twice the rank, on the unchanged base."""

    label: ClassVar[str] = "PiSSA"
    rate: ClassVar[float] = 0.5
    begins_as_base: ClassVar[bool] = False
    svd_iterations: Positive | None = None
    """Power iterations of a randomized decomposition, much quicker on large weights; 16 is plenty. None: the exact
    one."""


class Adalora(LowRank, frozen=True, kw_only=True):
    """LoRA that begins with more than `rank` in every layer and takes rank away where it matters least, until layers
    have `rank` on average (arXiv 2303.10512). The artifact is a plain LoRA adapter with a rank for each layer."""

    label: ClassVar[str] = "AdaLoRA"
    rate: ClassVar[float] = 15
    takes_loss_scaling: ClassVar[bool] = False
    scale_formula: ClassVar[str] = "alpha / first rank"
    initial_rank: Positive | None = None
    """Rank of every layer at first. None: half as much again as `rank`."""
    prune_after: Fraction = 0.1
    """Share of the stage's steps before the first rank is taken away."""
    prune_until: Fraction = 0.7
    """Share of the steps after which ranks stay."""
    prune_every: Positive | None = None
    """Steps between two prunings. None: as many as make about 50 prunings in all."""
    beta1: Fraction = 0.85
    """Decay of the running mean of a weight's importance."""
    beta2: Fraction = 0.85
    """Decay of the running mean of how uncertain that is."""
    orthogonality: AtLeast0 = 0.5
    """Weight of the loss that keeps the directions of a layer apart from each other."""

    @property
    def first_rank(self) -> int:
        # 1.5 · rank rounded up, in whole numbers: 8 gives 12, and 5 gives 8.
        return self.initial_rank or -(-3 * self.rank // 2)


class Virtual(_Method, frozen=True, kw_only=True):
    """What all adapters have that put trained tokens before every row and leave the model's weights alone."""

    virtual_tokens: Positive = 20
    """How many there are. They count towards the model's longest row."""


class Prefix(Virtual, frozen=True, kw_only=True):
    """Prefix tuning: keys and values of the virtual tokens are trained, in every layer (arXiv 2101.00190)."""

    label: ClassVar[str] = "prefix tuning"
    rate: ClassVar[float] = 25
    projection: bool = False
    """Make them from narrower ones by two layers that are trained along and dropped afterwards; steadier, slower."""
    hidden_size: Positive | None = None
    """Width between those two layers. None: the model's."""


class Prompt(Virtual, frozen=True, kw_only=True):
    """Prompt tuning: embeddings of the virtual tokens are trained (arXiv 2104.08691)."""

    label: ClassVar[str] = "prompt tuning"
    rate: ClassVar[float] = 5
    init: Literal["vocabulary", "text", "random"] = "vocabulary"
    """What they begin as: embeddings of tokens drawn from the vocabulary, of `text`, or noise of the same size."""
    text: Text | None = None
    """The text for init = "text", repeated or cut to `virtual_tokens`."""


class PTuning(Virtual, frozen=True, kw_only=True):
    """P-tuning: embeddings of the virtual tokens come from an encoder that is trained and dropped afterwards
    (arXiv 2103.10385)."""

    label: ClassVar[str] = "P-tuning"
    rate: ClassVar[float] = 5
    encoder: Literal["mlp", "lstm"] = "mlp"
    """Three linear layers, or a bidirectional LSTM and two of them."""
    hidden_size: Positive | None = None
    """Width of the encoder. None: the model's."""
    encoder_layers: Positive = 2
    """Layers of the LSTM."""
    encoder_dropout: Fraction = 0.0
    """Dropout between layers of the LSTM."""


class Full(_Method, frozen=True, kw_only=True):
    """Full fine-tuning: no adapter, every weight of the model is trained."""

    label: ClassVar[str] = "full fine-tuning"
    # 2e-4 for SFT with LoRA becomes 2e-5 where every weight is trained.
    rate: ClassVar[float] = 0.1


# In this order messages list the kinds, and recipes/COMPATIBILITY.md has its rows.
Adapter = Lora | Rslora | Dora | Pissa | Adalora | Prefix | Prompt | PTuning | Full
