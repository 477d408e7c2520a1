"""The vocabulary of a recipe: every table and key that a user may write, with its default and its meaning.

Structs are frozen. A key that is not here is an error, never ignored. The string below a field is its documentation:
`ftlaunch schema` publishes it, so an editor shows it while the recipe is written.
"""

from typing import Annotated

from msgspec import Meta, field

from ftlaunch.recipe.adapter import Adapter, Full
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.noise import Noise, NoNoise
from ftlaunch.recipe.stages import Optimizer, Parallel, Stage
from ftlaunch.recipe.track import Track
from ftlaunch.recipe.types import Name, NonNegative, Table, Text


class Sweep(Table, frozen=True, kw_only=True):
    """Variants of a recipe, which `ftlaunch compare` runs one after another: each of `variants` with each combination
    of `grid`. The first is what the others are compared with."""

    variants: dict[Name, list[Text]] = field(default_factory=dict[Name, list[Text]])
    """Name of a variant → settings as `--set` has them: dora = ["adapter.kind=dora", "adapter.rank=16"]. Paths in them
    count from this recipe, as all others."""
    # A grid varies single values. A variant that changes several keys together is one of `variants`.
    grid: dict[Text, Annotated[list[bool | int | float | Text], Meta(min_length=1)]] = field(
        default_factory=dict[Text, list[bool | int | float | Text]]
    )
    """Key, in quotes → its values: "adapter.rank" = [4, 8]."""


class Recipe(Table, frozen=True, kw_only=True):
    """A whole run: a model, what is done to it, on which data and on how many processes."""

    # These three have no default. Only a recipe with `extends` may leave them to its base.
    name: Name
    """The run's name, and its folder's: runs/NAME."""
    model: Model
    """[model]"""
    stage: Annotated[list[Stage], Meta(min_length=1)]
    """[[stage]] entries, in the order in which they run; each starts from what the one before it made."""
    data: dict[Name, Data] = field(default_factory=dict[Name, Data])
    """[data.NAME] tables."""
    adapter: Adapter = field(default_factory=Full)
    """[adapter]. Without one, every weight is trained."""
    noise: Noise = field(default_factory=NoNoise)
    """[noise]. Disturbs activations in training, and may replace the model's activation function."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """[optimizer]"""
    parallel: Parallel = field(default_factory=Parallel)
    """[parallel]"""
    track: Track = field(default_factory=Track)
    """[track]. Experiment trackers that are sent the metrics; none unless named."""
    seed: NonNegative = 42
    """Seed of the split, the row order, the adapter's first weights and, with the rank, of dropout and noise."""
    deterministic: bool = False
    """Only kernels that give the same bits every time; slower on a GPU."""
    sweep: Sweep | None = None
    """[sweep]. Variants of this recipe, for `ftlaunch compare`."""
    extends: Text | None = None
    """A recipe whose keys count where this one is silent. It may not itself extend another."""

    @property
    def parallel_tables(self) -> list[Parallel]:
        """[parallel], and those of the stages that have one of their own."""
        # A merge has no such key.
        own = [getattr(stage, "parallel", None) for stage in self.stage]
        return [self.parallel, *(table for table in own if table is not None)]

    @property
    def leaves_strategy_open(self) -> bool:
        """Whether [parallel], or a stage's own one, says strategy = "auto"."""
        return any(table.strategy == "auto" for table in self.parallel_tables)
