"""Which stage starts from what another has made, and where adapters are merged on the way."""

from msgspec import Struct

from ftlaunch.plan import resolve
from ftlaunch.plan.resolve import Resolved, ResolvedStage
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.recipe.stages import Merge, Ppo, Stage


class Link(Struct, frozen=True):
    """A stage of a run, with what it starts from; paths are relative to the run folder."""

    name: str
    """Name of its folder: `01-sft`."""
    stage: Stage
    resolved: Resolved
    start: str | None = None
    """The artifact or merged model that it starts from. None: the plain base."""
    reward: str | None = None
    """The reward model that a PPO stage asks."""


def links(recipe: Recipe) -> list[Link]:
    """Every stage in order. A stage with another adapter than that it starts from begins on a merge of the two."""
    made: list[Link] = []
    for one in resolve.resolve(recipe):
        start = _artifact(made, one.before)
        if one.before is not None and one.begins_on_merge:
            start = _merged(made, one.before)
        reward = _artifact(made, one.reward) if isinstance(one.stage, Ppo) else None
        made.append(Link(_name(made, one.stage), one.stage, one.tables, start, reward))
    return made


def is_merged(chain: list[Link], link: Link) -> bool:
    """Whether a merge follows of what a stage trains, also after other stages have gone on with its adapter."""
    # Only artifacts are followed: what starts from NN-merge/model trains on a base of its own.
    later = [other for other in chain if other.start == f"{link.name}/artifact"]
    return any(isinstance(other.stage, Merge) or is_merged(chain, other) for other in later)


def _merged(made: list[Link], trained: ResolvedStage) -> str:
    """Where the merge of a training is: an earlier one, or one that is put in here."""
    artifact = _artifact(made, trained)
    # Stages that start from the same training share one merge, whether the recipe asks for it or not.
    there = next((link for link in made if isinstance(link.stage, Merge) and link.start == artifact), None)
    if there is None:
        merge = Merge()
        there = Link(_name(made, merge), merge, resolve.for_merge_of(trained.tables), artifact)
        # The merge takes its number before the stage that starts from it is named.
        made.append(there)
    return f"{there.name}/model"


def _artifact(made: list[Link], trained: ResolvedStage | None) -> str | None:
    # By identity: two stages of a recipe may be equal in every key.
    return next((f"{link.name}/artifact" for link in made if trained and link.stage is trained.stage), None)


def _name(made: list[Link], stage: Stage) -> str:
    # Counted over what the run holds, not by the recipe's index: merges that are put in have numbers as well.
    return f"{len(made) + 1:02d}-{stage.__struct_config__.tag}"
