"""The vocabulary of [track]: experiment trackers that are sent the metrics."""

from typing import Literal

from msgspec import field

from ftlaunch.recipe.types import Table, Text

# accelerate has a class for each of these, and the trainer sends metrics through it.
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet", "swanlab"]


class Track(Table, frozen=True, kw_only=True):
    """Experiment trackers, through accelerate. metrics.jsonl has everything without them."""

    to: list[Tracker] = field(default_factory=list[Tracker])
    """Trackers by name; each needs its package. They sign in by their own login or environment: no key stands here."""
    project: Text | None = None
    """What they call the project. None: the run's name. Each stage is a run of it, called like its folder."""
    offline: bool = False
    """Have wandb, comet and swanlab keep on disk what they would send, for compute nodes without a network; their own
    tools send it later. TensorBoard's files, mlflow's default store and trackio are local anyway."""
