"""How long an optimizer step takes: the operations that it needs, over what a device is published or measured to do."""

from pathlib import Path

from msgspec import Struct

from ftlaunch import rows
from ftlaunch.plan import resolve
from ftlaunch.plan.cost import answers, trained
from ftlaunch.plan.cost.answers import Answers
from ftlaunch.plan.cost.memory import tokens_of
from ftlaunch.plan.cost.shape import Shape
from ftlaunch.recipe.adapter import Full
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.stages import METRICS, Dpo, Evaluate, Pairwise, Ppo, Sft, Training
from ftlaunch.run.spec import StageSpec

SHARE_OF_PEAK = 0.4
"""Share of a GPU's published peak that training reaches with rows laid end to end; others report 0.3 to 0.5."""
SHARE_OF_MEASURED = {True: 0.6, False: 0.7}
"""The same of what a large matrix product was measured to reach, on a GPU and on a CPU; there
`tests/benchmarks/calibrated.py` compares."""
READING = {True: 64, False: 8}
"""Tokens whose forward pass takes as long as reading all weights once, which each token of an answer does: on a GPU, of
an A100's data sheet (312 TFLOP/s at 40 % over 2 TB/s, two bytes and two operations a weight), and on a CPU."""
LARGEST_COUNTED = 2 << 30
"""Bytes of a file whose lines are counted."""
LOOKED_AT = 256
"""Rows of a data set, the first ones, whose length is looked at."""
BYTES_OF_TOKEN = 4
"""Characters per token of English text, with a vocabulary of some ten thousand; other languages and code have fewer."""


class Typical(Struct, frozen=True, kw_only=True):
    """Seconds, with rows as long as the first ones."""

    tokens: int
    """Length of a row, at `BYTES_OF_TOKEN`."""
    step: float
    total: float | None


class Time(Struct, frozen=True, kw_only=True):
    """Seconds, with every row as long as it may be."""

    step: float
    steps: int | None
    """Optimizer steps of the stage; None where the rows are not counted here."""
    total: float | None
    device_hours: float | None
    """Hours of all processes together."""
    evaluation: float = 0.0
    """Seconds of one evaluation, with its answers; `total` includes them."""
    counts_evaluations: bool = True
    """Whether the rows of evaluations are counted here; else only their answers are in `evaluation`."""
    typical: Typical | None = None
    """None where rows cannot be read here, or are padded."""


def of_stage(spec: StageSpec, shape: Shape, operations_per_second: float, *, cuda: bool) -> Time:
    """Return the time of a training stage on devices that do so many operations a second."""
    stage = spec.stage
    assert isinstance(stage, Training)
    tokens, _ = tokens_of(spec)
    step = tokens * spec.accumulation * operations(spec, shape) / operations_per_second
    generated = answers.of_training(spec, stage)
    held = 0 if isinstance(stage, Ppo) else _held_out(spec)
    of_row = tokens // spec.micro_batch_size * forward_operations(spec, shape) * (1 + _looks(spec))
    looked = evaluation = -(-(held or 0) // spec.world_size) * of_row / operations_per_second
    if generated is not None:
        passes = _passes(generated, cuda=cuda) * forward_operations(spec, shape) / operations_per_second
        if isinstance(stage, Ppo):
            step += passes / _steps_of_rollout(stage)
        else:
            evaluation += passes
    steps = stage.steps or _steps(spec, stage)
    total = None if steps is None else step * steps + evaluation * _evaluations(stage, steps)
    hours = None if total is None else total * spec.world_size / 3600
    typical = None
    if (share := _share(spec)) is not None:
        saved = 0.0 if steps is None else step * steps + looked * _evaluations(stage, steps)
        typical = Typical(
            tokens=round(share * tokens / spec.micro_batch_size),
            step=step * share,
            total=None if total is None else total - (1 - share) * saved,
        )
    return Time(
        step=step,
        steps=steps,
        total=total,
        device_hours=hours,
        evaluation=evaluation,
        counts_evaluations=held is not None,
        typical=typical,
    )


def of_evaluation(spec: StageSpec, shape: Shape, operations_per_second: float, *, cuda: bool) -> Time | None:
    """Return the time of an evaluate stage: `total` alone. None where its prompts are not counted here."""
    stage, (data,) = spec.stage, spec.data.values()
    assert isinstance(stage, Evaluate)
    held = _held_out(spec)
    rows_asked = _lines(data) if held == 0 else held
    counts = [count for count in (rows_asked, stage.prompts) if count is not None]
    if not counts:
        return None
    count = -(-min(counts) // spec.world_size)
    needs = {METRICS.get(metric, "answers") for metric in stage.metrics}
    asked = Answers(
        phase="answers",
        count=count * stage.beams,
        batch=min(stage.batch_size, count) * stage.beams,
        prompt=data.max_length,
        tokens=stage.max_new_tokens,
        of_logit=answers.CHOSEN,
    )
    passes = _passes(asked, cuda=cuda) if "answers" in needs else 0
    passes += len(needs - {"answers"}) * count * data.max_length
    models = 2 if stage.compare and spec.start else 1
    total = models * passes * forward_operations(spec, shape) / operations_per_second
    return Time(step=0.0, steps=0, total=total, device_hours=total * spec.world_size / 3600)


def _share(spec: StageSpec) -> float | None:
    """How long the first rows are, of the longest that a row may be, by the weights of their data sets; None where
    that is not known or says nothing of time."""
    # A padded micro-batch takes as long as its longest row, and a rollout as its answers.
    if not isinstance(spec.stage, Sft | Pairwise) or not spec.stage.packing:
        return None
    longest = max(data.max_length for data in spec.data.values())
    sides = 2 if isinstance(spec.stage, Pairwise) else 1
    told = weights = 0.0
    for data in spec.data.values():
        sizes = rows.text_sizes(data, LOOKED_AT)
        if not sizes:
            return None
        # A side of a pair counts as its half: both are cut at the same length.
        tokens = [min(size / BYTES_OF_TOKEN / sides, data.max_length) for size in sizes]
        told, weights = told + data.weight * sum(tokens) / len(tokens), weights + data.weight
    return told / weights / longest


def _passes(generated: Answers, *, cuda: bool) -> int:
    """Tokens whose forward pass takes as long as all answers of a process. Each batch takes one token at a time, and
    reads all weights for it, as well as a pass over its prompts."""
    batches = -(-generated.count // generated.batch)
    return generated.count * generated.prompt + batches * generated.tokens * max(generated.batch, READING[cuda])


def _steps_of_rollout(stage: Ppo) -> int:
    return (stage.rollout_size or stage.batch_size) // stage.batch_size * stage.ppo_epochs


def _evaluations(stage: Training, steps: int) -> int:
    """Evaluations of a stage: every so many steps, and after the last."""
    return -(-steps // stage.evaluate_every) if stage.evaluate_every else 1


def operations(spec: StageSpec, shape: Shape) -> float:
    """Return the operations of a token in a training step.

    Two for each weight forward; backward two for the weights below whatever is trained, and two more for trained ones;
    a third pass where activations are computed again.
    """
    stage = spec.stage
    what = trained.of(spec.adapter, shape)
    layer, head = _layer_operations(spec, shape), 2 * shape.embedding_parameters
    forward = forward_operations(spec, shape)
    backward = layer * what.layers_backward + head
    trains = forward if isinstance(spec.adapter, Full) else 6 * what.parameters
    again = layer * what.layers_backward if getattr(stage, "activation_checkpointing", False) else 0
    return forward * (1 + _looks(spec)) + backward + trains + again


def forward_operations(spec: StageSpec, shape: Shape) -> float:
    """Return the operations of a token in a forward pass."""
    return _layer_operations(spec, shape) * shape.layers + 2 * shape.embedding_parameters


def _layer_operations(spec: StageSpec, shape: Shape) -> float:
    in_layer = sum(linear.inputs * linear.outputs for linear in shape.linears)
    if shape.expert_parameters:
        in_layer += shape.experts_per_token * 3 * shape.width * shape.mlp
    return 2 * in_layer + 2 * shape.queries * max((data.max_length for data in spec.data.values()), default=0)


def _looks(spec: StageSpec) -> float:
    """Forward passes of a token that serve no backward pass: those of references, and of scores of rollouts."""
    match spec.stage:
        case Dpo() as stage:
            return float(resolve.reference(stage, spec.adapter) == "live")
        case Ppo() as stage:
            # A rollout is read by policy, reference and reward model, and serves several passes.
            return (2 + (stage.reward_function is None)) / stage.ppo_epochs
        case _:
            return 0.0


def _steps(spec: StageSpec, stage: Training) -> int | None:
    """Optimizer steps, where all of the rows lie in files whose lines can be counted."""
    counts = [_rows(data) for data in spec.data.values()]
    if any(count is None for count in counts):
        return None
    trained_on = sum(count for count in counts if count)
    passes = (stage.epochs or 1) * (stage.ppo_epochs if isinstance(stage, Ppo) else 1)
    return max(1, -(-int(trained_on * passes) // stage.batch_size))


def _rows(data: Data) -> int | None:
    """Rows that are trained on; None where they are not one a line."""
    count = _lines(data)
    return None if count is None else count - _test_rows(data, count)


def _held_out(spec: StageSpec) -> int | None:
    """Rows that an evaluation reads; None where they are not one a line, and no number of them is given."""
    held = 0
    for data in spec.data.values():
        named = rows.for_evaluation(data)
        count = 0 if data.test == int(data.test) else _lines(data)
        of_file = 0 if named is None else _lines(named)
        if count is None or of_file is None:
            return None
        held += _test_rows(data, count) + of_file
    return held


def _test_rows(data: Data, count: int) -> int:
    return int(data.test if data.test >= 1 else data.test * count)


def _lines(data: Data) -> int | None:
    """Rows of a file, those beyond the limit apart; None where they are not one a line."""
    path = Path(data.path)
    if data.format == "text" or path.suffix != ".jsonl" or not path.is_file() or path.stat().st_size > LARGEST_COUNTED:
        return None
    with path.open("rb") as file:
        count = sum(1 for line in file if line.strip())
    return min(count, data.limit or count)
