"""The rule of what goes together: the table of ftlaunch.compatibility, walked for each stage of a recipe."""

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

from ftlaunch import compatibility, resolve
from ftlaunch.chain import needs_merge
from ftlaunch.compatibility.axes import describe
from ftlaunch.errors import Problem
from ftlaunch.load import Loaded
from ftlaunch.noise import no_config_says
from ftlaunch.recipe import Merge, Training
from ftlaunch.rules.stage import TableName, TrainedStage


def values_go_together(training: TrainedStage) -> Iterator[Problem]:
    """What a training stage is made of goes together."""
    combination = describe(training.stage, training.resolved)
    for refusal in compatibility.refusals(combination):
        table, _, key = refusal.key.partition(".")
        message = refusal.said(combination)
        if table == "stage":
            yield training.problem(key, message, refusal.remedy)
        else:
            yield training.table_problem(cast("TableName", table), key, message, refusal.remedy)


def merges_are_supported(loaded: Loaded) -> Iterator[Problem]:
    """What stages have trained can be merged where the recipe, or a later stage with another adapter, merges it."""
    recipe = loaded.recipe
    for index, stage in enumerate(recipe.stage):
        trained = resolve.trained_before(recipe, stage)
        if trained is None:
            continue
        if isinstance(stage, Merge):
            yield from _merged(loaded, index, trained, "merge")
        elif needs_merge(recipe, trained, resolve.for_stage(recipe, stage)):
            yield from _merged(loaded, index, trained, "other_adapter")


def _merged(loaded: Loaded, index: int, trained: Training, after: str) -> Iterator[Problem]:
    """Problems of the stage at `index`, which merges what `trained` has left."""
    tables = resolve.for_stage(loaded.recipe, trained)
    for noise in resolve.worn(loaded.recipe, trained) or [tables.noise]:
        combination = describe(trained, replace(tables, noise=noise)) | {"after": after}
        for refusal in compatibility.refusals(combination):
            if "after" in refusal.of:
                key = refusal.key.split(".")[1:]
                message = refusal.said(combination, reason=no_config_says(noise) or "")
                yield loaded.problem(("stage", index, *key), message, refusal.remedy)
