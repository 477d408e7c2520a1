"""What every place that runs are started in can do: the verbs that the rest of the launcher knows, and no others.

Six of them each backend has a word of its own for. The others have one here, which is right where whoever asks for a
run starts its processes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from ftlaunch.backend.status import RunStatus
from ftlaunch.errors import UserError
from ftlaunch.plan import machine
from ftlaunch.plan.plan import Plan, make_plan
from ftlaunch.processes import trainer
from ftlaunch.processes.outcome import Failure
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.run.layout import RunDir, StageDir
from ftlaunch.tools import ToolOptions

if TYPE_CHECKING:
    from ftlaunch.load import Loaded
    from ftlaunch.plan.cost.costs import Cost

Say = Callable[[str], None]


class Request(Struct, frozen=True, kw_only=True):
    """What a scheduler is asked for on behalf of a stage."""

    script: str
    """The batch script, to the byte as it is submitted."""
    price: str
    """What it may use up at most."""
    saving: str | None
    """How long it has to save, where it trains."""
    cpus: str
    """How many CPUs each node gives."""


@dataclass(frozen=True)
class Foreseen:
    """What is known of a plan before it is started."""

    costs: "Mapping[str, Cost | str]"
    """What each stage costs, or why that cannot be told, by its name."""
    requests: Mapping[str, Request] = field(default_factory=dict[str, Request])
    """What a scheduler is asked for, by the stage's name; empty where there is none."""
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    """What a job's processes have of the submitting shell and the cluster's profile."""


class Backend(ABC):
    """Where the stages of runs are started: on this machine, on nodes that are held, or as jobs of a cluster."""

    patience = 0.0
    """Seconds between two looks at a run. 0: looking disturbs nobody."""
    one_by_one = True
    """Whether only one run works at a time."""

    @abstractmethod
    def start(self, run: RunDir, *, detach: bool, after: str | None, fresh: bool) -> int | None:
        """Start the unfinished stages and return the exit code; None where the run goes on by itself.

        `after` is a job's number or a run to wait for. `fresh`: nothing of the run has begun, and its folder goes away
        where it cannot be started.
        """

    @abstractmethod
    def conduct(self, runs: Mapping[str, RunDir], at_once: int | None, say: Say) -> int:
        """See several runs, by what a person calls them, to their ends, at most so many at once; the exit code.

        A failing run does not keep the others from running.
        """

    @abstractmethod
    def states(self, runs: Sequence[RunDir]) -> list[RunStatus]:
        """How runs of this kind stand, in their order."""

    @abstractmethod
    def is_over(self, run: RunDir) -> bool:
        """Whether nothing of a run works any more. False where that cannot be seen from here."""

    @abstractmethod
    def ask_to_stop(self, run: RunDir) -> UserError | None:
        """Have the stage that runs save and leave, and no other start. Return what to say if not all could be told."""

    @abstractmethod
    def cancel(self, run: RunDir) -> None:
        """End every process of a run at once. UserError where that is not possible from here."""

    def check(self, loaded: "Loaded") -> None:  # noqa: B027 - nothing is right
        """RecipeError where a recipe was settled by what is true of another place."""

    def plan(self, recipe: Recipe, folder: Path) -> Plan:
        """The plan of one run of a recipe, with what is known of the machine that it will be on."""
        return make_plan(recipe, folder, machine.look())

    def foresee(self, plan: Plan) -> Foreseen:
        """What a plan costs, and what a scheduler is asked for on its behalf."""
        from ftlaunch.plan.cost import costs

        return Foreseen(costs.here(plan.specs))

    def require(self, plan: Plan, after: str | None) -> None:  # noqa: B027 - nothing is right
        """UserError where a plan cannot be started from here, nor wait for `after`."""

    def claim(self, run: RunDir, source: Path | None = None) -> None:  # noqa: B027 - nothing is right
        """Note in a run's folder that the run goes on here. The caller holds the run's lock, or has just made it.

        `source` is the recipe's file, whose project jobs are given a copy of; None: as submitting finds it.
        """

    def release(self, run: RunDir) -> None:  # noqa: B027 - nothing is right
        """Forget that a run was to go on here: another backend has claimed it. The caller holds the run's lock."""

    def require_rest(self, run: RunDir) -> None:  # noqa: B027 - nothing is right
        """UserError where something of a run works or waits that its lock does not tell of."""

    def last_words(self, stage_dir: StageDir) -> Failure | None:  # noqa: ARG002 - for jobs
        """What ended a stage so that it had no time to write it down."""
        return None

    def call(self, options: ToolOptions) -> int:
        """Run the tool that the options are for, and return its exit code. UserError where it cannot be run."""
        return trainer.call(options)
