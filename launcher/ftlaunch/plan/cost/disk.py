"""What a run's stages write to disk, and what a merge takes."""

from msgspec import Struct

from ftlaunch.plan.cost import shape as shapes
from ftlaunch.plan.cost import trained
from ftlaunch.plan.cost.activations import FLOAT
from ftlaunch.plan.cost.memory import ROOM_CPU, ROOM_GPU, Memory, Part
from ftlaunch.plan.cost.shape import Shape
from ftlaunch.recipe.adapter import Full
from ftlaunch.recipe.stages import Evaluate, Merge, Training
from ftlaunch.run.spec import StageSpec


class Disk(Struct, frozen=True, kw_only=True):
    """Bytes on disk, of all ranks together."""

    checkpoint: int = 0
    """One of them."""
    checkpoints: int = 0
    """All that lie there at the same time: those that are kept, the best one, and the one that is being written."""
    result: int = 0
    """The artifact, or the merged model."""


def of_stage(spec: StageSpec, shape: Shape, size: int) -> Disk:
    """What a stage writes; `size` is the bytes of an element that is computed with."""
    stage = spec.stage
    if isinstance(stage, Training):
        parameters = trained.of(spec.adapter, shape).parameters
        one = 3 * FLOAT * parameters  # weights and both moments, in fp32
        saves = stage.keep + 2
        if stage.steps is not None:
            saves = min(saves, -(-stage.steps // stage.save_every))
        result = parameters * (size if isinstance(spec.adapter, Full) else FLOAT)
        return Disk(checkpoint=one, checkpoints=one * saves, result=result)
    if isinstance(stage, Merge):
        return Disk(result=merged_bytes(stage, shape) * (2 if spec.model.is_quantized else 1))
    return Disk()


def merged_bytes(stage: Merge, shape: Shape) -> int:
    """Size of a merged model."""
    size = shape.disk_bytes if stage.dtype is None else {"fp32": 4}.get(stage.dtype, 2)
    return size * shape.parameters


TEXTS, ROWS = 100, 8 * 64
"""Tokens of the fixed texts, and of the rows held out at most, on which a merge is checked (`merging/probes.py`)."""


def memory_of_merge(stage: Merge, shape: Shape, size: int, *, has_rows: bool) -> Memory:
    """A merge holds one output file at a time. Before and after that it has the logits of adapter model, bare base and
    merged model, with one of these models in memory, which is read from a mapped file."""
    shard = min(stage.max_shard_bytes, merged_bytes(stage, shape))
    model = size * shape.parameters
    # Where nothing is converted, the model is the file's pages.
    mapped = shape.disk_bytes * shape.parameters if size != shape.disk_bytes else 0
    logits = FLOAT * (TEXTS + ROWS * has_rows) * shape.vocabulary
    parts = [
        Part("libraries", ROOM_CPU),
        Part("one output file", shard),
        Part("model, while it is checked", model),
        Part("file of that model", mapped),
        Part("logits of the check", 3 * logits),
    ]
    phases = {"writing": shard + 2 * logits, "check": mapped + model + 3 * logits}
    return Memory(
        device="cpu",
        parts=parts,
        phases={name: ROOM_CPU + size for name, size in phases.items()},
    )


def memory_of_evaluation(spec: StageSpec, stage: Evaluate, shape: Shape, size: int, *, cuda: bool) -> Memory:
    """An evaluation holds the weights, and the keys and values of the answers that are generated side by side."""
    longest = max((data.max_length for data in spec.data.values()), default=0) + stage.max_new_tokens
    cache = shapes.cache_bytes(shape, stage.batch_size * stage.beams, longest, size)
    parts = [
        Part("libraries", ROOM_GPU if cuda else ROOM_CPU),
        Part("weights", shapes.held_bytes(shape, str(spec.model.quantization), size)),
        Part("keys and values of answers", cache),
    ]
    phases = {"answers": sum(part.bytes for part in parts)}
    return Memory(device="cuda" if cuda else "cpu", parts=parts, phases=phases)
