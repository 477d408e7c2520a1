"""The vocabulary of [noise]: what disturbs a model's activations in training, and what they are replaced by.

Throughout, a is the output of a site and y what the model goes on with. In evaluation, in reference passes and in
rollouts y is a.
"""

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from ftlaunch.recipe.types import Above0, AtLeast0, Kind, Positive, Text

MLP = "mlp-activation"
"""What `sites` calls the activation functions of all MLP blocks."""
KEEP = "keep"
Activation = Literal[
    "keep",
    "sigmoid",
    "tanh",
    "relu",
    "softplus",
    "leaky_relu",
    "prelu",
    "elu",
    "selu",
    "gelu",
    "gelu_tanh",
    "silu",
    "mish",
    "golu",
    "hard_tanh",
    "hard_sigmoid",
]
# transformers' "gelu" is the exact function with erf, as here; only the approximation by tanh has another name.
HIDDEN_ACT = {
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "relu": "relu",
    "leaky_relu": "leaky_relu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "silu": "silu",
    "mish": "mish",
}
"""What transformers calls those activations that a model's config may name."""
# Both ends are refused: 0 would be no noise, and at 1 the factor 1 / (1 - p) is infinite.
Probability = Annotated[float, Meta(gt=0, lt=1)]


class _Sited(Kind, frozen=True, kw_only=True):
    """What every kind has, none included."""

    family: ClassVar[str]
    """What sort of noise it is, which decides what it goes with."""
    sites: Text | list[Text] = MLP
    """Modules whose outputs are disturbed: "mlp-activation" (the activation function of every MLP block), a list of
    module names (whole, or their last parts: "act_fn", "mlp"), or one regular expression for whole names."""
    activation: Activation = "keep"
    """Activation function that takes the place of each site for good, in training and in use; "keep" leaves what is
    there. It goes with the artifact. golu is x·exp(-exp(-x)) (arXiv 2502.03654); prelu's slope stays 0.25."""


# The class's name would give the tag "no_noise".
class NoNoise(_Sited, frozen=True, kw_only=True, tag="none"):
    """No noise: y = a. The activation function may still be replaced."""

    family: ClassVar[str] = "none"


class _Annealed(_Sited, frozen=True, kw_only=True):
    """What every noise has."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the noise's strength over the stage's optimizer steps; linear and cosine go from all of it to 0."""


class _Drawn(_Annealed, frozen=True, kw_only=True):
    """What every noise has that needs no gradient and no activation function of its own."""

    family: ClassVar[str] = "drawn"


class _Additive(_Drawn, frozen=True, kw_only=True):
    """What noise that is added to an activation has."""

    mean: float = 0.0
    """Mean of the noise."""
    std: Above0 = 0.1
    """Standard deviation of the noise."""
    relative: bool = False
    """Mean and deviation are multiples of the activation's root mean square at each token, rather than absolute."""


class Gaussian(_Additive, frozen=True, kw_only=True):
    """Gaussian noise on each element: y = a + mean + std·ξ, with ξ ~ N(0, 1)."""


class Uniform(_Additive, frozen=True, kw_only=True):
    """Uniform noise on each element: y = a + mean + U(-c, c), with c = √3·std."""


class Multiplicative(_Drawn, frozen=True, kw_only=True):
    """Gaussian noise that each element is multiplied by: y = a·(mean + std·ξ). Annealing ends at y = a."""

    mean: float = 1.0
    """Mean of the factor. 1 keeps the activation's expectation; 0 would destroy the signal and is refused."""
    std: Above0 = 0.1
    """Standard deviation of the factor."""


class Poisson(_Drawn, frozen=True, kw_only=True):
    """Poisson noise on each element, less its mean: y = a + scale·(Poisson(rate) - rate)."""

    rate: Above0 = 1.0
    """Mean, and variance, of the Poisson distribution."""
    scale: Above0 = 0.1
    """What an event counts."""
    relative: bool = False
    """The scale is a multiple of the activation's root mean square at each token, rather than absolute."""


class _Masking(_Drawn, frozen=True, kw_only=True):
    """What the kinds of dropout have."""

    probability: Probability = 0.1
    """Probability p that something is dropped."""


class Dropout(_Masking, frozen=True, kw_only=True):
    """Each element is 0 with probability p, else a / (1 - p)."""


class GaussianDropout(_Masking, frozen=True, kw_only=True):
    """Each element is multiplied by N(1, p / (1 - p)), dropout's mean and variance (Srivastava et al. 2014)."""


class LockedDropout(_Masking, frozen=True, kw_only=True):
    """Dropout with one mask for all tokens of a row: a channel is dropped in the whole row (arXiv 1512.05287)."""


class DropPath(_Masking, frozen=True, kw_only=True):
    """A row's whole activation is 0 with probability p, else a / (1 - p) (stochastic depth, arXiv 1603.09382)."""


class AlphaDropout(_Masking, frozen=True, kw_only=True):
    """Dropout to SELU's negative saturation that keeps mean 0 and variance 1 (arXiv 1706.02515)."""


class Adversarial(_Annealed, frozen=True, kw_only=True):
    """The loss is L(a) + weight·L(a + δ), with δ of size epsilon along the gradient of L (FGM, arXiv 1605.07725; FGSM,
    1412.6572), found again in each micro-batch; with several steps PGD (1706.06083). SFT only."""

    family: ClassVar[str] = "adversarial"
    epsilon: Above0 = 0.1
    """Size of δ."""
    relative: bool = False
    """epsilon is a multiple of the activation's own size, rather than absolute."""
    norm: Literal["l2", "linf"] = "l2"
    """"l2": δ = epsilon·g / ‖g‖ (FGM). "linf": δ = epsilon·sign(g) (FGSM); the size is then that of each element, and
    the activation's its root mean square at each token."""
    per: Literal["token", "row"] = "token"
    """What l2 is measured over."""
    steps: Positive = 1
    """Gradient steps towards δ. More than one is PGD, and costs as many passes more."""
    step_size: Above0 | None = None
    """Length of a step, as a multiple of epsilon. None: 1 for one step, else 2.5 / steps."""
    weight: AtLeast0 = 1.0
    """Weight of the disturbed loss."""


# _Sited, so without a schedule: the noise belongs to the function itself and does not fade during a stage.
class Saturated(_Sited, frozen=True, kw_only=True):
    """An activation function with noise only where it saturates (Gulcehre et al. 2016, arXiv 1603.00391):
    alpha·h(x) + (1 - alpha)·u(x) + d(x)·s(x)·ξ, with h hard, u its linear part, Δ = h - u, d = -sgn(x)·sgn(1 - alpha)
    and s = std·(σ(sharpness·Δ) - ½)². In evaluation ξ is its mean; so the function is part of the artifact."""

    family: ClassVar[str] = "saturated"
    activation: Literal["hard_tanh", "hard_sigmoid"] = "hard_tanh"
    """h, which takes the place of each site: hard_tanh is x within ±1, hard_sigmoid x / 4 + ½ within 0 and 1."""
    alpha: Above0 = 1.1
    """Above 1 the function leans back where it saturates, and below 1 it leans on; 1 would leave no noise."""
    std: Above0 = 0.25
    """Largest deviation is a quarter of it. The paper's c."""
    sharpness: Above0 = 1.0
    """How soon the noise grows beyond saturation. The paper's p, which it learns; here it stays."""
    draw: Literal["half-normal", "normal"] = "half-normal"
    """Distribution of ξ: |N(0, 1)|, of mean 0.798, or N(0, 1)."""


Noise = (
    NoNoise
    | Gaussian
    | Uniform
    | Multiplicative
    | Poisson
    | Dropout
    | GaussianDropout
    | LockedDropout
    | DropPath
    | AlphaDropout
    | Adversarial
    | Saturated
)


def replaces(table: Noise) -> bool:
    """Whether a model with this table computes something else in evaluation, too."""
    return table.activation != KEEP


def no_config_says(table: Noise) -> str | None:
    """Why a plain transformers folder cannot hold what a table has made of a model; None where it can."""
    # Comes first, as `activation` is "hard_tanh" by default here and would get the less exact message below.
    if isinstance(table, Saturated):
        return f"transformers has no {table.activation} with Gulcehre's noise"
    if not replaces(table):
        return None
    if table.activation not in HIDDEN_ACT:
        return f"transformers has no activation function {table.activation}"
    if table.sites != MLP:
        return f'a config names one activation function for all MLP blocks, and sites is not "{MLP}"'
    return None
