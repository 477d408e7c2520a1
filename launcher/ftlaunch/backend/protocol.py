"""What every place that runs are started in can do: the verbs that the rest of the launcher knows, and no others."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from ftlaunch.backend.status import RunStatus
from ftlaunch.errors import UserError
from ftlaunch.plan.plan import Plan
from ftlaunch.processes.outcome import Failure
from ftlaunch.recipe import Recipe
from ftlaunch.run.layout import RunDir, StageDir


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


class Requests(Struct, frozen=True, kw_only=True):
    """What a scheduler is asked for on behalf of a plan."""

    requests: Mapping[str, Request]
    """By the stage's name."""
    variables: Mapping[str, str]
    """What the stages' processes have of the submitting shell and the cluster's profile."""


class Backend(Protocol):
    """Where the stages of runs are started: on this machine, on nodes that are held, or as jobs of a cluster."""

    patience: float
    """Seconds between two looks at a run. 0: looking disturbs nobody."""

    def plan(self, recipe: Recipe, folder: Path) -> Plan:
        """The plan of one run of a recipe, with what is known of the machine that it will be on."""
        ...

    def describe(self, plan: Plan) -> Requests | None:
        """What a scheduler is asked for on behalf of a plan. None where none is asked."""
        ...

    def require(self, plan: Plan, after: str | None) -> None:
        """UserError where a plan cannot be started from here, nor wait for `after`: a job's number, or a run."""
        ...

    def claim(self, run: RunDir, source: Path | None = None) -> None:
        """Note in a run's folder that the run goes on here. The caller holds the run's lock, or has just made it.

        `source` is the recipe's file, whose project jobs are given a copy of; None: as submitting finds it.
        """
        ...

    def release(self, run: RunDir) -> None:
        """Forget that a run was to go on here: another backend has claimed it. The caller holds the run's lock."""
        ...

    def require_rest(self, run: RunDir) -> None:
        """UserError where something of a run works or waits that its lock does not tell of."""
        ...

    def start(self, run: RunDir, *, detach: bool, after: str | None, fresh: bool) -> int | None:
        """Start the unfinished stages and return the exit code; None where the run goes on by itself.

        `fresh`: nothing of the run has begun, and its folder goes away where it cannot be started.
        """
        ...

    def states(self, runs: Sequence[RunDir]) -> list[RunStatus]:
        """How runs of this kind stand, in their order."""
        ...

    def is_over(self, run: RunDir) -> bool:
        """Whether nothing of a run works any more. False where that cannot be seen from here."""
        ...

    def last_words(self, stage_dir: StageDir) -> Failure | None:
        """What ended a stage before any of its processes could write a log."""
        ...

    def ask_to_stop(self, run: RunDir) -> UserError | None:
        """Have the stage that runs save and leave, and no other start. Return what to say if not all could be told."""
        ...

    def cancel(self, run: RunDir) -> None:
        """End every process of a run at once. UserError where that is not possible from here."""
        ...
