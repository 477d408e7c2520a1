"""Rules of a recipe as a whole: what its stages use, and what may follow what."""

from collections.abc import Callable, Iterator

from ftlaunch import resolve
from ftlaunch.errors import Problem
from ftlaunch.load import Loaded
from ftlaunch.load.wording import literal
from ftlaunch.recipe import Full, Merge, Reward
from ftlaunch.rules.stage import trainings


def data_is_used(loaded: Loaded) -> Iterator[Problem]:
    used = {name for training in trainings(loaded) for name in training.data_names}
    for name in loaded.recipe.data:
        if name not in used:
            remedy = f"remove the table, or write data = {literal(name)} in a stage"
            yield loaded.problem(("data", name), "is not used by any stage", remedy)


def base_stays_the_same(loaded: Loaded) -> Iterator[Problem]:
    for training in trainings(loaded):
        before = resolve.trained_before(loaded.recipe, training.stage)
        if before is None:
            continue
        earlier = resolve.for_stage(loaded.recipe, before).model.path
        if training.resolved.model.path != earlier:
            message = f"names another model than the stage before, whose result on {earlier} this one starts from"
            remedy = f"write path = {literal(earlier)}, or make two recipes"
            yield training.table_problem("model", "path", message, remedy)


def adapter_goes_on(loaded: Loaded) -> Iterator[Problem]:
    """A stage goes on training the adapter of the one before it; only full fine-tuning leaves room for a fresh one."""
    for training in trainings(loaded):
        before = resolve.trained_before(loaded.recipe, training.stage)
        earlier = before and resolve.for_stage(loaded.recipe, before).adapter
        if earlier is None or isinstance(earlier, Full) or training.resolved.adapter == earlier:
            continue
        message = "is not that of the stage before, whose adapter this one goes on training"
        remedy = "give both the same adapter, or merge first and start a run of its own from the merged model"
        yield training.problem("adapter", message, remedy)


def reward_is_no_policy(loaded: Loaded) -> Iterator[Problem]:
    """What a reward stage leaves gives rewards, not answers: no other kind of training can go on from it."""
    for training in trainings(loaded):
        before = resolve.trained_before(loaded.recipe, training.stage)
        if isinstance(before, Reward) and not isinstance(training.stage, Reward):
            kind = literal(training.stage.__struct_config__.tag)
            message = f"{kind} trains a policy, and the stage before, from which it would start, makes a reward model"
            yield training.problem("kind", message, "put it before the reward stage, or make two recipes")


def merge_is_last(loaded: Loaded) -> Iterator[Problem]:
    for index, stage in enumerate(loaded.recipe.stage[:-1]):
        if isinstance(stage, Merge):
            yield loaded.problem(("stage", index), "merge must be the last stage", "move it to the end, or remove it")


def merge_has_an_adapter(loaded: Loaded) -> Iterator[Problem]:
    recipe = loaded.recipe
    index, stage = len(recipe.stage) - 1, recipe.stage[-1]
    if not isinstance(stage, Merge):
        return
    trained = resolve.trained_before(recipe, stage)
    if trained is None:
        remedy = 'put a stage with kind = "sft" before it'
        yield loaded.problem(("stage", index), "merge has nothing to merge, as no stage comes before it", remedy)
    elif isinstance(resolve.for_stage(recipe, trained).adapter, Full):
        message = "merge has nothing to merge: after full fine-tuning the artifact is the model already"
        yield loaded.problem(("stage", index), message, 'remove the stage, or add [adapter] with kind = "lora"')
    elif resolve.for_stage(recipe, trained).model.allow_pickle:
        message = "merge copies safetensors tensor by tensor, and this model's weights may be pickled"
        remedy = "remove allow_pickle or the stage"
        yield loaded.problem(("stage", index), message, remedy)


RULES: tuple[Callable[[Loaded], Iterator[Problem]], ...] = (
    data_is_used,
    base_stays_the_same,
    adapter_goes_on,
    reward_is_no_policy,
    merge_is_last,
    merge_has_an_adapter,
)
