"""Rules of [noise] tables: by themselves, with the stage that they count for, and with merges behind it."""

import re
from collections.abc import Callable, Iterator

from ftlaunch import resolve
from ftlaunch.adapter import Full
from ftlaunch.chain import needs_merge
from ftlaunch.errors import Problem
from ftlaunch.load import Loaded
from ftlaunch.load.wording import literal
from ftlaunch.noise import MLP, Adversarial, Multiplicative, Saturated, no_config_says, replaces
from ftlaunch.recipe import Merge, Sft
from ftlaunch.rules.stage import TrainedStage, trainings

UNMERGED = "ship base and adapter unmerged, without the merge"


def factors_keep_the_signal(training: TrainedStage) -> Iterator[Problem]:
    noise = training.resolved.noise
    if isinstance(noise, Multiplicative) and noise.mean == 0:
        message = "activations multiplied by noise of mean 0 keep nothing of their signal"
        yield training.table_problem("noise", "mean", message, "write mean = 1.0, or leave it out")
    if isinstance(noise, Saturated) and noise.alpha == 1:
        message = "at 1 the direction of the noise, sgn(1 - alpha), is 0, and so is the noise"
        yield training.table_problem("noise", "alpha", message, "write alpha = 1.1, or 0.9")


def sites_compile(training: TrainedStage) -> Iterator[Problem]:
    sites = training.resolved.noise.sites
    if isinstance(sites, list):
        if not sites:
            yield training.table_problem("noise", "sites", "names no module", f"write sites = {literal(MLP)}")
        return
    try:
        re.compile(sites)
    except re.error as error:
        message = f"{literal(sites)} is not a regular expression: {error}"
        remedy = f"correct it, or write {literal(MLP)} or a list of module names"
        yield training.table_problem("noise", "sites", message, remedy)


def adversaries_have_their_stage(training: TrainedStage) -> Iterator[Problem]:
    """They need the gradient of the loss before its backward pass, and the same activations twice."""
    if not isinstance(training.resolved.noise, Adversarial):
        return
    stage, parallel = training.stage, training.resolved.parallel
    if not isinstance(stage, Sft):
        message = f"adversarial noise is for stages of kind {literal('sft')}"
        remedy = 'give this stage noise.kind = "none", or a kind that needs no gradient, such as "gaussian"'
        yield training.table_problem("noise", "kind", message, remedy)
    elif stage.r_drop:
        message = "adversarial noise and R-Drop each compute a batch twice, and not together"
        yield training.problem("r_drop", message, "remove one of the two")
    if stage.activation_checkpointing:
        message = "activations that are computed again would be disturbed by the gradient that they gave"
        yield training.problem("activation_checkpointing", message, "remove it, or write another noise.kind")
    if parallel.zero_stage:
        message = (
            "adversarial noise takes a gradient between two passes, which DeepSpeed would take for the backward pass"
        )
        yield training.table_problem("parallel", "strategy", message, 'write strategy = "ddp", or another noise.kind')


def kind_of_neftune_counts(training: TrainedStage) -> Iterator[Problem]:
    stage = training.stage
    if isinstance(stage, Sft) and stage.neftune_noise != "uniform" and not stage.neftune_alpha:
        yield training.problem("neftune_noise", "counts only with neftune_alpha above 0", "add neftune_alpha = 5.0")


def whole_models_name_their_activation(training: TrainedStage) -> Iterator[Problem]:
    """The config of a model that is trained in full says what activation it has, or no reader would know."""
    noise = training.resolved.noise
    if isinstance(training.resolved.adapter, Full) and replaces(noise) and noise.sites != MLP:
        message = "a model trained in full can have one activation function in all MLP blocks, as its config names one"
        yield training.table_problem("noise", "sites", message, f"write sites = {literal(MLP)}, or add [adapter]")


RULES: tuple[Callable[[TrainedStage], Iterator[Problem]], ...] = (
    factors_keep_the_signal,
    sites_compile,
    adversaries_have_their_stage,
    kind_of_neftune_counts,
    whole_models_name_their_activation,
)


def merges_can_hold_activations(loaded: Loaded) -> Iterator[Problem]:
    """A merged model is a plain transformers folder, which cannot hold every replaced activation function."""
    recipe = loaded.recipe
    for index, stage in enumerate(recipe.stage):
        if isinstance(stage, Merge) and (trained := resolve.trained_before(recipe, stage)):
            for reason in filter(None, map(no_config_says, resolve.worn(recipe, trained))):
                message = f"the merged model could not hold the activation function of [noise]: {reason}"
                yield loaded.problem(("stage", index), message, UNMERGED)
    for training in trainings(loaded):
        before = resolve.trained_before(recipe, training.stage)
        if before and needs_merge(recipe, before, training.resolved):
            for reason in filter(None, map(no_config_says, resolve.worn(recipe, before))):
                message = f"is another than before, so this stage begins on a merge, which could not hold: {reason}"
                yield training.problem("adapter", message, "give both stages the same adapter")
