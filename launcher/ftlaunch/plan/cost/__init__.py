"""What a stage will cost: memory, disk and time, by arithmetic on config.json alone."""

from ftlaunch.plan.cost import shape as shapes
from ftlaunch.plan.cost.memory import Memory, of_stage
from ftlaunch.run.spec import StageSpec

SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}


def memory(spec: StageSpec, *, cuda: bool = False) -> Memory:
    """Memory of a rank of a training stage whose number format is settled."""
    shape = shapes.read(spec.model.path)
    assert shape is not None
    return of_stage(spec, shape, SIZES[spec.model.dtype], cuda=cuda)
