"""The rules of what goes together: the table of ftlaunch.rules.compatibility, walked for each stage of a recipe."""

from collections.abc import Iterator
from typing import cast

from msgspec.structs import replace

from ftlaunch.errors import Problem
from ftlaunch.load import Loaded
from ftlaunch.plan import resolve
from ftlaunch.plan.resolve import Resolved, ResolvedStage
from ftlaunch.recipe.noise import no_config_says
from ftlaunch.recipe.stages import Merge, Training
from ftlaunch.rules import compatibility
from ftlaunch.rules.compatibility.axes import Combination, describe
from ftlaunch.rules.compatibility.refusals import Refusal
from ftlaunch.rules.stage import TableName, TrainedStage, trainings


def values_go_together(training: TrainedStage) -> Iterator[Problem]:
    """What a training stage is made of."""
    combination = describe(training.stage, training.resolved)
    for refusal in compatibility.refusals(combination):
        yield _problem(training, refusal, refusal.said(combination))


def stages_go_on(training: TrainedStage) -> Iterator[Problem]:
    """What the stage before has trained, with this one after it."""
    own, before = training.resolved, training.whole.before
    if before is not None:
        after = "same_adapter" if before.tables.adapter == own.adapter else "other_adapter"
        # This stage chooses quantization and dtype itself; only what was trained comes from the earlier one.
        for refusal, message in _refused_after(before, replace(before.tables, model=own.model), after):
            yield _problem(training, refusal, message)


def merges_have_a_result(loaded: Loaded) -> Iterator[Problem]:
    """What the stage before has trained, with a merge after it."""
    for one in resolve.resolve(loaded.recipe):
        if isinstance(one.stage, Merge) and one.before is not None:
            for refusal, message in _refused_after(one.before, one.before.tables, "merge"):
                yield loaded.problem(("stage", one.index), message, refusal.remedy)


def _refused_after(before: ResolvedStage, tables: Resolved, after: str) -> Iterator[tuple[Refusal, str]]:
    """Yield each refusal of what comes after a training, with its message; all replaced activation functions count."""
    assert isinstance(before.stage, Training)
    # Where no activation function was replaced, the stage's own table says so.
    for noise in before.replaced_activations or [tables.noise]:
        combination: Combination = describe(before.stage, replace(tables, noise=noise)) | {"after": after}
        for refusal in compatibility.refusals(combination):
            # The other refusals concern the earlier stage by itself, where values_go_together finds them.
            if "after" in refusal.of:
                yield refusal, refusal.said(combination, reason=no_config_says(noise) or "")


def _problem(training: TrainedStage, refusal: Refusal, message: str) -> Problem:
    # "stage.packing" is a key of the stage itself, "adapter.kind" one of a table.
    table, _, key = refusal.key.partition(".")
    if table == "stage":
        return training.problem(key, message, refusal.remedy)
    return training.table_problem(cast("TableName", table), key, message, refusal.remedy)


def combinations_are_supported(loaded: Loaded) -> Iterator[Problem]:
    """Every combination of a recipe."""
    for training in trainings(loaded):
        yield from values_go_together(training)
        yield from stages_go_on(training)
    yield from merges_have_a_result(loaded)
