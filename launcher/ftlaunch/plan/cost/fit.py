"""What would not fit first, and what its user may write instead."""

from collections.abc import Callable
from functools import partial
from itertools import combinations

from msgspec import Struct
from msgspec.structs import replace

from ftlaunch.plan.cost.devices import Device
from ftlaunch.plan.cost.memory import Memory, of_stage
from ftlaunch.plan.cost.shape import Shape
from ftlaunch.recipe.adapter import Full, Lora, Prefix, PTuning
from ftlaunch.recipe.noise import Adversarial
from ftlaunch.recipe.stages import Ppo, Training
from ftlaunch.run.spec import StageSpec

WAYS = 3
"""Ways out that are told."""
CHANGES = 3
"""Changes that a way out may consist of."""
FEW_ANSWERS = 4
"""Answers that PPO draws side by side where memory is short."""
Way = tuple[str, StageSpec]
"""What to write in the recipe, and the stage that it makes."""
Change = Callable[[StageSpec, Training], Way | None]
"""One thing that saves memory; None where it is done already, or cannot be."""


class WayOut(Struct, frozen=True):
    """What a user may write to need less."""

    words: str
    needed: int
    """Bytes at the peak."""
    fits: bool


class Misfit(Struct, frozen=True):
    """A stage that needs more memory than a process has."""

    part: str
    """The first thing for which there is no room, once what comes before it is held."""
    needed: int
    available: int
    ways: list[WayOut]


def misfit(spec: StageSpec, shape: Shape, size: int, device: Device, memory: Memory) -> Misfit | None:
    """What does not fit; None where all does, or where nobody knows how much memory there is."""
    if device.memory is None or memory.needed <= device.memory:
        return None
    held, part = 0, memory.parts[-1].name
    for each in sorted(memory.parts, key=lambda part: part.name != "libraries"):
        held += each.bytes
        if held > device.memory:
            part = each.name
            break
    return Misfit(part, memory.needed, device.memory, _ways_out(spec, shape, size, device, device.memory))


def _ways_out(spec: StageSpec, shape: Shape, size: int, device: Device, available: int) -> list[WayOut]:
    """The first few that suffice, fewest changes first; where none does, the one that comes nearest."""
    found: list[tuple[frozenset[Change], WayOut]] = []
    nearest: WayOut | None = None
    for count in range(1, CHANGES + 1):
        for changes in combinations(CHANGES_BY_PRICE, count):
            if any(fewer <= set(changes) for fewer, _ in found) or (made := _made(spec, changes)) is None:
                continue
            words, other = made
            peak = of_stage(other, shape, size, cuda=device.cuda).needed
            way = WayOut(words, peak, peak <= available)
            if way.fits:
                found.append((frozenset(changes), way))
            elif nearest is None or peak < nearest.needed:
                nearest = way
            if len(found) == WAYS:
                return [way for _, way in found]
    return [way for _, way in found] or ([nearest] if nearest else [])


def _made(spec: StageSpec, changes: tuple[Change, ...]) -> Way | None:
    """All of these changes together; None where one of them does nothing."""
    words: list[str] = []
    for change in changes:
        assert isinstance(spec.stage, Training)
        made = change(spec, spec.stage)
        if made is None:
            return None
        words.append(made[0])
        spec = made[1]
    return " and ".join(words), spec


def _smaller_batches(spec: StageSpec, stage: Training) -> Way | None:
    if spec.micro_batch_size == 1:
        return None
    rest = stage.batch_size // spec.world_size
    return "micro_batch_size = 1", replace(spec, micro_batch_size=1, accumulation=rest)


def _fewer_answers(spec: StageSpec, stage: Training) -> Way | None:
    if not isinstance(stage, Ppo) or stage.generation_batch_size <= FEW_ANSWERS:
        return None
    other = replace(spec, stage=replace(stage, generation_batch_size=FEW_ANSWERS))
    return f"generation_batch_size = {FEW_ANSWERS}", other


def _checkpointing(spec: StageSpec, stage: Training) -> Way | None:
    # A prefix is there only once, and adversarial noise would disturb what is computed again.
    if stage.activation_checkpointing or isinstance(spec.adapter, Prefix) or isinstance(spec.noise, Adversarial):
        return None
    return "activation_checkpointing = true", replace(spec, stage=replace(stage, activation_checkpointing=True))


def _goes_with_zero(spec: StageSpec, zero_stage: int) -> bool:
    """Whether no rule refuses the rest of the stage under DeepSpeed (`rules.compatibility`)."""
    if spec.optimizer.name != "adamw" or spec.model.quantization == "int8" or isinstance(spec.noise, Adversarial):
        return False
    if isinstance(spec.adapter, PTuning) and spec.adapter.encoder == "lstm":
        return False
    return zero_stage < 3 or spec.model.rounding is None


def _sharded(spec: StageSpec, _: Training, strategy: str, zero_stage: int) -> Way | None:
    if spec.world_size == 1 or spec.parallel.zero_stage >= zero_stage or not _goes_with_zero(spec, zero_stage):
        return None
    parallel = replace(spec.parallel, strategy=strategy)
    return f'{_key(spec, "parallel")}.strategy = "{strategy}"', replace(spec, parallel=parallel)


def _key(spec: StageSpec, table: str) -> str:
    """The table's name, within its stage where the stage has one of its own."""
    return table if getattr(spec.stage, table) is None else f"stage.{table}"


def _adapter(spec: StageSpec, _: Training) -> Way | None:
    if not isinstance(spec.adapter, Full):
        return None
    return f'{_key(spec, "adapter")}.kind = "lora"', replace(spec, adapter=Lora())


def _few_bits(spec: StageSpec, _: Training) -> Way | None:
    if spec.model.quantization != "none" or isinstance(spec.adapter, Full):
        return None
    model = replace(spec.model, quantization="nf4")
    return f'{_key(spec, "model")}.quantization = "nf4"', replace(spec, model=model)


def _shorter(spec: StageSpec, _: Training) -> Way | None:
    longest = max((data.max_length for data in spec.data.values()), default=0)
    if longest <= 512:
        return None
    half = longest // 2
    data = {name: replace(one, max_length=min(one.max_length, half)) for name, one in spec.data.items()}
    return f"max_length = {half}", replace(spec, data=data)


def _offload(spec: StageSpec, _: Training) -> Way | None:
    if spec.parallel.offload == "cpu" or spec.model.is_quantized or not _goes_with_zero(spec, spec.parallel.zero_stage):
        return None
    kept = spec.parallel.strategy if spec.parallel.zero_stage else "zero2"
    parallel, key = replace(spec.parallel, strategy=kept, offload="cpu"), _key(spec, "parallel")
    words = f'{key}.strategy = "{kept}" and {key}.offload = "cpu"'
    return words, replace(spec, parallel=parallel)


CHANGES_BY_PRICE: tuple[Change, ...] = (
    _smaller_batches,
    _fewer_answers,
    _checkpointing,
    partial(_sharded, strategy="zero2", zero_stage=2),
    partial(_sharded, strategy="zero3", zero_stage=3),
    _adapter,
    _few_bits,
    _shorter,
    _offload,
)
"""What costs least time or quality first."""
