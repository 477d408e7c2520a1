"""What the trainer is told of one stage: the content of step.json."""

from msgspec import Struct

from ftlaunch.recipe.adapter import Adapter
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.noise import Noise, NoNoise
from ftlaunch.recipe.stages import Optimizer, Parallel, Stage
from ftlaunch.recipe.track import Track


class StageSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that the trainer is told about one stage, in `step.json`: overrides resolved, derived values filled in."""

    name: str
    """The run's name."""
    stage: Stage
    model: Model
    adapter: Adapter
    noise: Noise = NoNoise()
    optimizer: Optimizer
    parallel: Parallel
    track: Track = Track()
    data: dict[str, Data]
    """The tables that the stage names, in its order."""
    seed: int
    deterministic: bool
    world_size: int
    # These three count for training stages only; a merge or an evaluation has the defaults.
    micro_batch_size: int = 1
    accumulation: int = 1
    """Micro-batches of one process in an optimizer step."""
    learning_rate: float = 0.0
    start: str | None = None
    """Artifact folder that the stage starts from, relative to the run folder. None: the plain base."""
    reward: str | None = None
    """Artifact folder of the reward model that scores answers, relative to the run folder. None: the stage says."""
    merged: bool = False
    """Whether the plan has a merge of what this stage trains, so that it must fit the base before the first step."""
    training_hash: str
    """SHA-256 of what decides the course of training; checkpoints carry it."""
