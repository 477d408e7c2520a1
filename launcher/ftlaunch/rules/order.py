"""Rules of a recipe as a whole: what its stages use, and what may follow what."""

from collections.abc import Callable, Iterator

from ftlaunch.errors import Problem
from ftlaunch.load import Loaded
from ftlaunch.load.messages import as_toml, join_or
from ftlaunch.plan import resolve
from ftlaunch.recipe.stages import Evaluate, Merge, Reward, Training
from ftlaunch.rules.stage import trainings

COPIES = "merge copies safetensors tensor by tensor, and this model's weights may be pickled"


def data_is_used(loaded: Loaded) -> Iterator[Problem]:
    used = {name for training in trainings(loaded) for name in training.stage.data_names}
    used |= {stage.data for stage in loaded.recipe.stage if isinstance(stage, Evaluate)}
    for name in loaded.recipe.data:
        if name not in used:
            remedy = f"remove the table, or write data = {as_toml(name)} in a stage"
            yield loaded.problem(("data", name), "is not used by any stage", remedy)


def base_stays_the_same(loaded: Loaded) -> Iterator[Problem]:
    for training in trainings(loaded):
        if (before := training.whole.before) is None:
            continue
        # Only the path: how the base is held, dtype and quantization, is each stage's own choice.
        earlier = before.tables.model.path
        if training.resolved.model.path != earlier:
            message = f"names another model than the stage before, whose result on {earlier} this one starts from"
            remedy = f"write path = {as_toml(earlier)}, or make two recipes"
            yield training.table_problem("model", "path", message, remedy)


def start_is_one_earlier_stage(loaded: Loaded) -> Iterator[Problem]:
    for one in resolve.resolve(loaded.recipe):
        index, stage, found = one.index, one.stage, len(one.named)
        # A merge cannot start from "base", which has no adapter to fold.
        if stage.start is None or (stage.start == resolve.BASE and not isinstance(stage, Merge)):
            continue
        if found != 1:
            earlier = enumerate(loaded.recipe.stage[:index])
            known = [f"{place} ({one.__struct_config__.tag})" for place, one in earlier if isinstance(one, Training)]
            message = f"{as_toml(stage.start)} is {found or 'none'} of the earlier training stages"
            remedy = f"name one by its place: {join_or(known)}" if known else "remove it: there is none"
            yield loaded.problem(("stage", index, "start"), message, remedy)


def reward_is_no_policy(loaded: Loaded) -> Iterator[Problem]:
    """What a reward stage leaves gives rewards, not answers: no other kind of training can go on from it."""
    for training in trainings(loaded):
        before = training.whole.before
        if before is not None and isinstance(before.stage, Reward) and not isinstance(training.stage, Reward):
            kind = as_toml(training.stage.__struct_config__.tag)
            message = f"{kind} trains a policy, and the stage before, from which it would start, makes a reward model"
            yield training.problem(
                "kind", message, 'put it before the reward stage, or say where it starts: start = "base"'
            )


def merge_has_its_weights(loaded: Loaded) -> Iterator[Problem]:
    for one in resolve.resolve(loaded.recipe):
        # A start that names no stage is reported by start_is_one_earlier_stage.
        if not isinstance(one.stage, Merge) or (one.stage.start is not None and not one.named):
            continue
        if one.before is None:
            remedy = 'put a stage with kind = "sft" before it'
            yield loaded.problem(
                ("stage", one.index), "merge has nothing to merge, as no stage comes before it", remedy
            )
        elif one.before.tables.model.allow_pickle:
            yield loaded.problem(("stage", one.index), COPIES, "remove allow_pickle or the stage")


def merge_on_the_way_reads_safetensors(loaded: Loaded) -> Iterator[Problem]:
    for training in trainings(loaded):
        if training.resolved.model.allow_pickle and training.whole.begins_on_merge:
            message = f"is not that of the stage before, so this one begins on a merge; {COPIES}"
            yield training.problem("adapter", message, "remove allow_pickle, or give both the same adapter")


RULES: tuple[Callable[[Loaded], Iterator[Problem]], ...] = (
    data_is_used,
    base_stays_the_same,
    start_is_one_earlier_stage,
    reward_is_no_policy,
    merge_has_its_weights,
    merge_on_the_way_reads_safetensors,
)
