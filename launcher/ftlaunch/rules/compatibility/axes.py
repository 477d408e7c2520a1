"""What a training stage is made of: the axes along which stages differ, and how each value is written and read."""

from collections.abc import Callable, Iterable, Mapping
from typing import get_args

from msgspec import Struct

from ftlaunch.plan.resolve import Resolved
from ftlaunch.recipe.adapter import Adapter, LowRank, PTuning, Virtual
from ftlaunch.recipe.model import FewBits, Qat
from ftlaunch.recipe.noise import HIDDEN_ACT, MLP, Noise, replaces
from ftlaunch.recipe.stages import Dpo, OptimizerName, Pairwise, Ppo, Sft, Stage, Strategy, Training
from ftlaunch.recipe.types import kinds

# Taken from the vocabulary, so that a new kind has its place here without an edit.
VIRTUAL = kinds(Adapter, lambda kind: issubclass(kind, Virtual))
PLAIN = kinds(Adapter, lambda kind: issubclass(kind, LowRank) and kind.is_plain)
LOSS_UNSCALED = kinds(Adapter, lambda kind: not kind.takes_loss_scaling)
STAGES = kinds(Stage, lambda kind: issubclass(kind, Training))
WITH_HEAD = kinds(Stage, lambda kind: issubclass(kind, Training) and kind.has_head)
PAIR_POLICIES = kinds(Stage, lambda kind: issubclass(kind, Pairwise) and not kind.has_head)
"""Stages that train a policy on pairs."""
ZERO = tuple(name for name in get_args(Strategy) if name.startswith("zero"))
IN_FEW_BITS = tuple(name for name in get_args(FewBits) if name != "none")
# Values of the axis `quantization`: "lsq" is kind = "qat" with learned_step.
ROUNDED = ("qat", "lsq", "bitlinear")
PAGED = tuple(name for name in get_args(OptimizerName) if name.startswith("paged"))
DRAWN = kinds(Noise, lambda kind: kind.family == "drawn")

Combination = Mapping[str, str]
"""A value for every axis, or for some."""


class Axis(Struct, frozen=True):
    """One thing in which training stages differ."""

    name: str
    values: Mapping[str, tuple[str, ...]]
    """Each value with the ways to write it: settings as `--set` takes them, a space between two. The plainest
    is the first."""
    read: Callable[[Training, Resolved], str] | None = None
    """The value of a stage. None: it is not the stage alone that tells."""


def _axis(name: str, read: Callable[[Training, Resolved], str] | None, **values: str | tuple[str, ...]) -> Axis:
    ways = {value: (way,) if isinstance(way, str) else way for value, way in values.items()}
    return Axis(name, ways, read)


def _key(name: str, key: str, values: Iterable[str], read: Callable[[Training, Resolved], str]) -> Axis:
    """An axis whose values are those of one key."""
    return _axis(name, read, **{value: f"{key}={value}" for value in values})


def _switch(name: str, on: str, read: Callable[[Training, Resolved], bool], off: str = "") -> Axis:
    """An axis with two values."""
    return Axis(name, {"off": (off,), "on": (on,)}, lambda stage, tables: "on" if read(stage, tables) else "off")


def _quantization(_: Training, tables: Resolved) -> str:
    table = tables.model.quantization
    if isinstance(table, str):
        return table
    # A value of its own, since some refusals concern learned steps and not "qat" in general.
    return "lsq" if isinstance(table, Qat) and table.learned_step else str(table.__struct_config__.tag)


def _activation(_: Training, tables: Resolved) -> str:
    if not replaces(tables.noise):
        return "kept"
    return "named" if tables.noise.activation in HIDDEN_ACT else "unnamed"


AXES = (
    _key("method", "adapter.kind", kinds(Adapter), lambda _, tables: str(tables.adapter.__struct_config__.tag)),
    _key("stage", "stage.0.kind", STAGES, lambda stage, _: str(stage.__struct_config__.tag)),
    _key("strategy", "parallel.strategy", get_args(Strategy), lambda _, tables: tables.parallel.strategy),
    _axis(
        "quantization",
        _quantization,
        none="model.quantization=none",
        **{name: f"model.quantization={name}" for name in IN_FEW_BITS},
        qat=("model.quantization.kind=qat", "model.quantization.kind=qat model.quantization.symmetric=false"),
        lsq="model.quantization.kind=qat model.quantization.learned_step=true",
        bitlinear=(
            "model.quantization.kind=bitlinear",
            "model.quantization.kind=bitlinear model.quantization.rms_norm=true",
        ),
    ),
    _switch(
        "packing",
        "stage.0.packing=true",
        lambda stage, _: isinstance(stage, Sft | Pairwise | Ppo) and stage.packing,
        off="stage.0.packing=false",
    ),
    _switch(
        "share_prompt", "stage.0.share_prompt=true", lambda stage, _: isinstance(stage, Pairwise) and stage.share_prompt
    ),
    _switch(
        "activation_checkpointing",
        "stage.0.activation_checkpointing=true",
        lambda stage, _: stage.activation_checkpointing,
    ),
    _switch(
        "accumulation",
        "stage.0.micro_batch_size=2",
        # A micro-batch that is all of a process's share is a single pass.
        lambda stage, tables: stage.micro_batch_size not in (None, stage.batch_size // tables.parallel.world_size),
    ),
    _axis(
        "noise",
        lambda _, tables: tables.noise.family,
        none="noise.kind=none",
        # Kinds that behave alike here share a value, which trials write in one of these ways.
        drawn=tuple(f"noise.kind={kind}" for kind in DRAWN),
        adversarial=("noise.kind=adversarial", "noise.kind=adversarial noise.steps=2 noise.norm=linf"),
        saturated="noise.kind=saturated",
    ),
    _axis(
        "activation",
        _activation,
        kept="noise.activation=keep",
        named=tuple(f"noise.activation={name}" for name in HIDDEN_ACT),
        unnamed=("noise.activation=hard_tanh", "noise.activation=hard_sigmoid"),
    ),
    _axis(
        "sites",
        lambda _, tables: "mlp" if tables.noise.sites == MLP else "other",
        mlp=f"noise.sites={MLP}",
        other='noise.sites=["act_fn"]',
    ),
    _switch(
        "neftune", "stage.0.neftune_alpha=5.0", lambda stage, _: isinstance(stage, Sft) and stage.neftune_alpha > 0
    ),
    _switch("r_drop", "stage.0.r_drop=1.0", lambda stage, _: isinstance(stage, Sft) and stage.r_drop > 0),
    _switch(
        "dropout",
        "adapter.dropout=0.1",
        lambda _, tables: isinstance(tables.adapter, LowRank) and tables.adapter.dropout > 0,
    ),
    _switch(
        "lora_plus", "optimizer.lora_plus_ratio=4.0", lambda _, tables: tables.optimizer.lora_plus_ratio is not None
    ),
    _switch(
        "lstm",
        "adapter.encoder=lstm",
        lambda _, tables: isinstance(tables.adapter, PTuning) and tables.adapter.encoder == "lstm",
    ),
    _axis(
        "reference",
        lambda stage, _: (stage.reference if isinstance(stage, Dpo) else None) or "default",
        default="",
        live="stage.0.reference=live",
        precomputed="stage.0.reference=precomputed",
    ),
    _key("optimizer", "optimizer.name", get_args(OptimizerName), lambda _, tables: tables.optimizer.name),
    _switch("offload", "parallel.offload=cpu", lambda _, tables: tables.parallel.offload != "none"),
    _key("dtype", "model.dtype", ("fp32", "auto", "bf16", "fp16"), lambda _, tables: tables.model.dtype),
    # "auto" is not refused as a CPU: whether there is a GPU is known only where the stage runs.
    _key(
        "device",
        "parallel.device",
        ("cpu", "cuda"),
        lambda _, tables: "cpu" if tables.parallel.device == "cpu" else "cuda",
    ),
    # No key of the stage says these: `combinations` adds "after", and trials choose how to resume.
    _axis("after", None, nothing="", merge="", same_adapter="", other_adapter=""),
    _axis("resumed_by", None, same_ranks="", other_ranks=""),
)
"""Every axis. Names that are keys of a recipe are spelt as there."""
BY_NAME = {axis.name: axis for axis in AXES}


def describe(stage: Training, tables: Resolved) -> dict[str, str]:
    """The values of a training stage on every axis that the stage alone decides."""
    return {axis.name: axis.read(stage, tables) for axis in AXES if axis.read is not None}
