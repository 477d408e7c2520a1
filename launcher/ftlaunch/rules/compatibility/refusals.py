"""What does not go together, as data: the values, the key to blame, why, and what to do about it."""

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from ftlaunch.load.messages import as_toml, join_or
from ftlaunch.recipe.adapter import Adapter
from ftlaunch.recipe.stages import Stage
from ftlaunch.recipe.types import kinds
from ftlaunch.rules.compatibility import axes

UNMERGED = "ship base and adapter unmerged, without the merge"
SHIP = "ship base and adapter: `ftlaunch chat` and plain peft load the artifact as it is"
ON = ("on",)


class Refusal(Struct, frozen=True):
    """Values that do not go together, and what to say of them."""

    of: Mapping[str, tuple[str, ...]]
    """Axis → values. It concerns every combination that has one of them on each of these axes."""
    key: str
    """The key to blame: "adapter.kind", or "stage.packing" for a key of the stage; "stage" where it is all of it."""
    message: str
    """Why. An axis in braces stands for the value, {reason} for why no config can hold an activation function."""
    remedy: str
    at_load: bool = False
    """Whether no such recipe can be read: the vocabulary refuses the key, or its value, and says what to do."""

    def concerns(self, combination: axes.Combination) -> bool:
        """Whether it refuses a combination. An axis that the combination is silent of is as any other value."""
        return all(combination.get(axis) in values for axis, values in self.of.items())

    def said(self, combination: axes.Combination, reason: str = "") -> str:
        """The message for a combination that it concerns."""
        return self.message.format(reason=reason, **{axis: as_toml(value) for axis, value in combination.items()})


def _but(axis: str, *values: str) -> tuple[str, ...]:
    """The values of an axis without these."""
    return tuple(value for value in axes.BY_NAME[axis].values if value not in values)


def _only(axis: str, union: Any, switch: str, key: str, values: tuple[str, ...] = ON) -> Refusal:
    """A key that only some kinds of a union have."""
    having = kinds(union, lambda kind: key.partition(".")[2] in kind.__struct_fields__)
    # In the words of load.key_advice, which a user sees: the page is to say the same.
    message = f"belongs to kind {join_or(map(as_toml, having))}, and this table's kind is {{{axis}}}"
    return Refusal({axis: _but(axis, *having), switch: values}, key, message, "remove it", at_load=True)


WITHOUT_KEY = (
    _only("stage", Stage, "share_prompt", "stage.share_prompt"),
    _only("stage", Stage, "neftune", "stage.neftune_alpha"),
    _only("stage", Stage, "r_drop", "stage.r_drop"),
    _only("stage", Stage, "reference", "stage.reference", ("live", "precomputed")),
    _only("method", Adapter, "dropout", "adapter.dropout"),
    _only("method", Adapter, "lstm", "adapter.encoder"),
    Refusal(
        {"noise": ("saturated",), "activation": ("kept", "named")},
        "noise.activation",
        'expected "hard_sigmoid" or "hard_tanh"',
        'leave it out for the default, "hard_tanh"',
        at_load=True,
    ),
)
"""What the vocabulary itself refuses."""

METHODS = (
    Refusal(
        {"method": (*axes.VIRTUAL, "full"), "lora_plus": ON},
        "optimizer.lora_plus_ratio",
        "is about the B matrices of low-rank adapters, and kind = {method} has none",
        'remove it, or write kind = "lora"',
    ),
    Refusal(
        {"method": axes.LOSS_UNSCALED, "dtype": ("fp16",)},
        "model.dtype",
        '"fp16" scales losses by a factor that changes, and AdaLoRA compares gradients of many steps',
        'write dtype = "bf16" or "fp32"',
    ),
    Refusal(
        {"method": axes.VIRTUAL, "stage": axes.WITH_HEAD},
        "adapter.kind",
        "{stage} reads rows as they are, and kind = {method} puts tokens before them",
        'write kind = "lora" for this stage',
    ),
    Refusal(
        {"method": axes.VIRTUAL, "stage": ("sft",), "packing": ON},
        "stage.packing",
        "rows laid end to end have no place before each for the virtual tokens of kind = {method}",
        "write packing = false",
    ),
    Refusal(
        # Apart from SFT's, as pairs need share_prompt turned off as well.
        {"method": axes.VIRTUAL, "stage": axes.PAIR_POLICIES, "packing": ON},
        "stage.packing",
        "rows laid end to end have no place before each for the virtual tokens of kind = {method}",
        "write packing = false and share_prompt = false",
    ),
    Refusal(
        {"method": ("prefix",), "activation_checkpointing": ON},
        "stage.activation_checkpointing",
        "computes layers again, and the keys and values of a prefix are there only once",
        'remove it, or write adapter.kind = "prompt"',
    ),
    Refusal(
        {"method": axes.VIRTUAL, "reference": ("live",)},
        "stage.reference",
        '"live" is the bare base, and virtual tokens make another policy of it from the start',
        'write reference = "precomputed", or remove it',
    ),
    Refusal(
        {"method": axes.VIRTUAL, "noise": _but("noise", "none")},
        "noise.kind",
        "is laid out by the tokens of rows, and virtual ones come before them",
        'remove [noise], or write adapter.kind = "lora"',
    ),
    Refusal(
        {"lstm": ON, "strategy": axes.ZERO},
        "adapter.encoder",
        "keeps its weights in a form of its own, which DeepSpeed cannot take apart",
        'write encoder = "mlp", or strategy = "ddp"',
    ),
    Refusal(
        {"method": ("full",), "reference": ("live",)},
        "stage.reference",
        '"live" needs an adapter that can be switched off, and every weight is trained',
        'write reference = "precomputed", or add [adapter]',
    ),
    Refusal(
        {"method": ("full",), "activation": _but("activation", "kept"), "sites": ("other",)},
        "noise.sites",
        "a model trained in full can have one activation function in all MLP blocks, as its config names one",
        'write sites = "mlp-activation", or add [adapter]',
    ),
)

STAGES = (
    Refusal(
        {"share_prompt": ON, "packing": ("off",)},
        "stage.packing",
        "padded answers cannot share their prompt",
        "write share_prompt = false as well, or remove it",
    ),
    Refusal(
        {"noise": ("adversarial",), "stage": _but("stage", "sft")},
        "noise.kind",
        'adversarial noise is for stages of kind "sft"',
        'give this stage noise.kind = "none", or a kind that needs no gradient, such as "gaussian"',
    ),
    Refusal(
        {"noise": ("adversarial",), "r_drop": ON},
        "stage.r_drop",
        "adversarial noise and R-Drop each compute a batch twice, and not together",
        "remove one of the two",
    ),
    Refusal(
        {"noise": ("adversarial",), "activation_checkpointing": ON},
        "stage.activation_checkpointing",
        "activations that are computed again would be disturbed by the gradient that they gave",
        "remove it, or write another noise.kind",
    ),
    Refusal(
        {"noise": ("adversarial",), "strategy": axes.ZERO},
        "parallel.strategy",
        "adversarial noise takes a gradient between two passes, which DeepSpeed would take for the backward pass",
        'write strategy = "ddp", or another noise.kind',
    ),
)

QUANTIZED = (
    Refusal(
        {"quantization": axes.IN_FEW_BITS, "method": ("full",)},
        "model.quantization",
        "{quantization} weights cannot be trained themselves, and there is no adapter",
        'add [adapter] with kind = "lora", or remove it',
    ),
    Refusal(
        {"quantization": axes.IN_FEW_BITS, "offload": ON},
        "parallel.offload",
        "{quantization} weights cannot be moved to host memory and back",
        "remove offload or quantization",
    ),
    Refusal(
        {"quantization": ("int8",), "strategy": axes.ZERO},
        "model.quantization",
        '"int8" weights keep their scales in another place, where {strategy} does not see them',
        'write strategy = "ddp", or quantization = "nf4"',
    ),
    Refusal(
        {"quantization": axes.ROUNDED, "strategy": ("zero3",)},
        "model.quantization",
        "rounding needs whole weights, and zero3 shares them out",
        'write strategy = "zero2" or "ddp"',
    ),
    Refusal(
        {"quantization": axes.ROUNDED, "dropout": ON},
        "adapter.dropout",
        "W + scale·BA is rounded as one weight, and dropout comes between the input and BA",
        "write dropout = 0",
    ),
    Refusal(
        {"quantization": axes.ROUNDED, "method": _but("method", *axes.PLAIN, "full")},
        "adapter.kind",
        "W + scale·BA is rounded as one weight, and {method} has none",
        f"write kind = {join_or(map(as_toml, (*axes.PLAIN, 'full')))}",
    ),
    Refusal(
        {"quantization": axes.ROUNDED, "stage": axes.WITH_HEAD},
        "model.quantization",
        "a stage of kind {stage} is not trained through rounded weights",
        "remove it",
    ),
)

PROCESSES = (
    Refusal(
        {"offload": ON, "strategy": _but("strategy", *axes.ZERO)},
        "parallel.offload",
        "only ZeRO can offload, and the strategy is {strategy}",
        'write strategy = "zero1", "zero2" or "zero3", or remove offload',
    ),
    Refusal(
        {"optimizer": _but("optimizer", "adamw"), "strategy": axes.ZERO},
        "optimizer.name",
        "{optimizer} keeps its state in a form that ZeRO cannot shard: ZeRO needs a plain AdamW",
        'write name = "adamw", or strategy = "ddp"',
    ),
    *(
        Refusal(
            # One for each, as the remedy is the form without paging of that very optimizer.
            {"optimizer": (name,), "device": ("cpu",)},
            "optimizer.name",
            "{optimizer} needs a GPU to page to and from, and the device is the CPU",
            f"write name = {as_toml(name.removeprefix('paged_'))}",
        )
        for name in axes.PAGED
    ),
    Refusal(
        {"dtype": ("fp16",), "device": ("cpu",)},
        "model.dtype",
        '"fp16" needs a GPU, and the device is the CPU',
        'write dtype = "bf16" or "fp32"',
    ),
)

MERGES = (
    Refusal(
        {"method": ("full",), "after": ("merge",)},
        "stage",
        "merge has nothing to merge: after full fine-tuning the artifact is the model already",
        'remove the stage, or add [adapter] with kind = "lora"',
    ),
    Refusal(
        {"method": axes.VIRTUAL, "after": ("merge",)},
        "stage",
        "merge has nothing to merge: virtual tokens are no part of any weight",
        f"remove the stage; {SHIP}",
    ),
    Refusal(
        {"method": axes.VIRTUAL, "after": ("other_adapter",)},
        "stage.adapter",
        "is not that of the stage before, whose virtual tokens cannot be merged for this one to begin on",
        'give both the same adapter, or write start = "base"',
    ),
    *(
        Refusal(
            {**of, "quantization": ("lsq", "bitlinear")},
            "model.quantization",
            "the stage before leaves weights that are rounded already, and this one would round them otherwise",
            'train both with the same adapter, or let this one start = "base"',
        )
        # A model trained in full is rounded itself; the same adapter goes on over a base that is not.
        for of in ({"after": ("other_adapter",)}, {"after": ("same_adapter",), "method": ("full",)})
    ),
    *(
        refusal
        # What a config cannot say: a function that transformers lacks, or one that is not in all MLP blocks.
        for activation in ({"activation": ("unnamed",)}, {"activation": ("named",), "sites": ("other",)})
        for refusal in (
            Refusal(
                {**activation, "after": ("merge",)},
                "stage",
                "the merged model could not hold the activation function of [noise]: {reason}",
                UNMERGED,
            ),
            Refusal(
                # Without "full", whose artifact is a model already: nothing is merged on the way.
                {"method": _but("method", "full"), **activation, "after": ("other_adapter",)},
                "stage.adapter",
                "is another than before, so this stage begins on a merge, which could not hold: {reason}",
                "give both stages the same adapter",
            ),
        )
    ),
)
"""What concerns the later stage: the key to blame is one of that stage."""

# The order gives the numbers in recipes/COMPATIBILITY.md.
REFUSALS = (*WITHOUT_KEY, *METHODS, *STAGES, *QUANTIZED, *PROCESSES, *MERGES)
