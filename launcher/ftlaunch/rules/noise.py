"""Rules of [noise] tables: by themselves, with the stage that they count for, and with the merges after it."""

from collections.abc import Callable, Iterator

from ftlaunch.errors import Problem
from ftlaunch.recipe.noise import MLP, Multiplicative, Saturated
from ftlaunch.recipe.stages import Sft
from ftlaunch.rules.stage import TrainedStage, names_modules


def factors_keep_the_signal(training: TrainedStage) -> Iterator[Problem]:
    noise = training.resolved.noise
    if isinstance(noise, Multiplicative) and noise.mean == 0:
        message = "activations multiplied by noise of mean 0 keep nothing of their signal"
        yield training.table_problem("noise", "mean", message, "write mean = 1.0, or leave it out")
    if isinstance(noise, Saturated) and noise.alpha == 1:
        message = "at 1 the direction of the noise, sgn(1 - alpha), is 0, and so is the noise"
        yield training.table_problem("noise", "alpha", message, "write alpha = 1.1, or 0.9")


def sites_compile(training: TrainedStage) -> Iterator[Problem]:
    yield from names_modules(training, "noise", "sites", MLP)


def kind_of_neftune_counts(training: TrainedStage) -> Iterator[Problem]:
    stage = training.stage
    if isinstance(stage, Sft) and stage.neftune_noise != "uniform" and not stage.neftune_alpha:
        yield training.problem("neftune_noise", "counts only with neftune_alpha above 0", "add neftune_alpha = 5.0")


RULES: tuple[Callable[[TrainedStage], Iterator[Problem]], ...] = (
    factors_keep_the_signal,
    sites_compile,
    kind_of_neftune_counts,
)
