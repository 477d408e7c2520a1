"""Rules of model.quantization: of stages that train through rounded weights, and of weights in 8 bits."""

from collections.abc import Callable, Iterator

from ftlaunch import resolve
from ftlaunch.adapter import Full
from ftlaunch.errors import Problem
from ftlaunch.recipe import BitLinear, Qat
from ftlaunch.rules.stage import TrainedStage


def _problem(training: TrainedStage, message: str, remedy: str) -> Problem:
    return training.table_problem("model", "quantization", message, remedy)


def steps_are_learned_around_zero(training: TrainedStage) -> Iterator[Problem]:
    rounding = training.resolved.model.rounding
    if isinstance(rounding, Qat) and rounding.learned_step and not rounding.symmetric:
        yield _problem(training, "learned_step needs integers around 0, and symmetric is false", "remove one of them")


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
    steps_are_learned_around_zero,
    rounding_once_is_enough,
)
