"""Rules of model.quantization: of stages that train through rounded weights, and of weights in 8 bits."""

from collections.abc import Callable, Iterator

from ftlaunch import resolve
from ftlaunch.adapter import Full
from ftlaunch.errors import Problem
from ftlaunch.load.wording import literal
from ftlaunch.recipe import BitLinear, Ppo, Qat, Reward
from ftlaunch.rules.stage import TrainedStage


def _problem(training: TrainedStage, message: str, remedy: str) -> Problem:
    return training.table_problem("model", "quantization", message, remedy)


def eight_bits_stay_whole(training: TrainedStage) -> Iterator[Problem]:
    parallel = training.resolved.parallel
    if training.resolved.model.quantization == "int8" and parallel.zero_stage:
        message = f'"int8" weights keep their scales beside them, where {parallel.strategy} does not see them'
        yield _problem(training, message, 'write strategy = "ddp", or quantization = "nf4"')


def steps_are_learned_around_zero(training: TrainedStage) -> Iterator[Problem]:
    rounding = training.resolved.model.rounding
    if isinstance(rounding, Qat) and rounding.learned_step and not rounding.symmetric:
        yield _problem(training, "learned_step needs integers around 0, and symmetric is false", "remove one of them")


def rounding_sees_the_whole_weight(training: TrainedStage) -> Iterator[Problem]:
    if training.resolved.model.rounding and training.resolved.parallel.strategy == "zero3":
        message = "rounding needs whole weights, and zero3 shares them out"
        yield _problem(training, message, 'write strategy = "zero2" or "ddp"')


def dropout_is_no_part_of_a_weight(training: TrainedStage) -> Iterator[Problem]:
    adapter = training.resolved.adapter
    if training.resolved.model.rounding and getattr(adapter, "dropout", 0):
        message = "W + scale·BA is rounded as one weight, and dropout comes between the input and BA"
        yield training.table_problem("adapter", "dropout", message, "write dropout = 0")


def adapters_add_to_a_weight(training: TrainedStage) -> Iterator[Problem]:
    adapter = training.resolved.adapter
    if training.resolved.model.rounding and adapter.__struct_config__.tag not in ("lora", "rslora", "full"):
        message = f"W + scale·BA is rounded as one weight, and {literal(adapter.__struct_config__.tag)} has none"
        yield training.table_problem("adapter", "kind", message, 'write kind = "lora", "rslora" or "full"')


def rounded_stages_are_tried(training: TrainedStage) -> Iterator[Problem]:
    """What nothing here has tried with rounded weights is refused."""
    if training.resolved.model.rounding and isinstance(training.stage, Ppo | Reward):
        kind = literal(training.stage.__struct_config__.tag)
        yield _problem(training, f"a stage of kind {kind} is not trained through rounded weights", "remove it")


def rounding_once_is_enough(training: TrainedStage) -> Iterator[Problem]:
    """Rounding by a mean, or by a learned step, changes what has been rounded so and stored."""
    recipe, rounding = training.loaded.recipe, training.resolved.model.rounding
    before = resolve.trained_before(recipe, training.stage)
    if before is None or not (isinstance(rounding, BitLinear) or (rounding and rounding.learned_step)):
        return
    earlier = resolve.for_stage(recipe, before)
    if isinstance(earlier.adapter, Full) or earlier.adapter != training.resolved.adapter:
        message = "the stage before leaves weights that are rounded already, and this one would round them otherwise"
        yield _problem(training, message, 'train both with the same adapter, or let this one start = "base"')


RULES: tuple[Callable[[TrainedStage], Iterator[Problem]], ...] = (
    eight_bits_stay_whole,
    steps_are_learned_around_zero,
    rounding_sees_the_whole_weight,
    dropout_is_no_part_of_a_weight,
    adapters_add_to_a_weight,
    rounded_stages_are_tried,
    rounding_once_is_enough,
)
