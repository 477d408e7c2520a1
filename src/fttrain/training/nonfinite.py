"""Losses and gradients that are NaN or infinite: the optimizer never steps on them, and a policy says what follows."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftlaunch.errors import UserError
from fttrain.checkpoint.store import Checkpoints
from fttrain.data.batches import MicroBatch
from fttrain.data.feed import Feed
from fttrain.engine import Engine
from fttrain.training.counters import Progress

MOST_IN_A_ROW = 10
"""Consecutive steps that may be skipped."""
MOST_NAMED = 8
"""Rows that a message names."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOutcome:
    """The result of one optimizer step's forward and backward passes."""

    loss: float
    """Over all ranks."""
    grad_norm: float
    """nan where the optimizer did not step."""
    suspects: Sequence[MicroBatch]
    """This rank's micro-batches whose own loss was not finite."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class NonFinitePolicy:
    """What to do about steps that are not finite. Every method is called by all ranks together."""

    def __init__(self, policy: str, engine: Engine, feed: Feed, checkpoints: Checkpoints) -> None:
        self._policy = policy
        self._engine = engine
        self._feed = feed
        self._checkpoints = checkpoints
        self._in_a_row = 0

    def handle(self, outcome: StepOutcome, micros: Sequence[MicroBatch], progress: Progress) -> dict[str, Any]:
        """Deal with a step, and return the metrics that say how; {} for a finite one.

        Raises UserError, naming the rows, where training cannot go on.
        """
        if outcome.is_finite:
            self._in_a_row = 0
            return {}
        if math.isfinite(outcome.loss) and self._engine.scales_loss:
            return {"skipped": 1}  # in fp16 the loss scale was too large, and has been halved
        self._in_a_row += 1
        blame = self._blame(outcome, micros, progress.step)
        if self._policy == "stop" or self._in_a_row > MOST_IN_A_ROW:
            self._checkpoints.settle()
            raise _cannot_go_on(f"{blame}; the optimizer did not step", self._in_a_row)
        if self._engine.world.is_main:
            log.warning("left out: %s", blame)
        if self._policy == "skip":
            return {"skipped": 1}
        return {"skipped": 1, "rewound_to": self._rewind(blame, progress)}

    def _blame(self, outcome: StepOutcome, micros: Sequence[MicroBatch], step: int) -> str:
        """Return what was not finite, and which rows of the step it came from."""
        # With a finite loss only the gradient overflowed, and gradients are summed over rows: all are suspects.
        suspects = micros if math.isfinite(outcome.loss) else outcome.suspects
        rows = sorted(
            row for found in self._engine.world.gather([m.rows for m in suspects]) for of in found for row in of
        )
        names = self._feed.names(step, rows[:MOST_NAMED])
        more = f" and {len(rows) - MOST_NAMED} more" if len(rows) > MOST_NAMED else ""
        what = "the gradient is not finite" if math.isfinite(outcome.loss) else f"the loss is {outcome.loss}"
        return f"step {step}: {what} with {'; '.join(names)}{more}"

    def _rewind(self, blame: str, progress: Progress) -> int:
        """Take weights and moments from the newest checkpoint and return its step; the data goes on after this step."""
        loaded = self._checkpoints.load()
        if loaded is None:
            raise _cannot_go_on(f"{blame}; there is no checkpoint to go back to", self._in_a_row)
        # Data and metrics must not go back: the same rows would fail again, and steps would be logged twice.
        here = progress.step
        vars(progress).update(loaded.state, step=here)
        return loaded.step


def _cannot_go_on(message: str, in_a_row: int) -> UserError:
    several = f" ({in_a_row} steps in a row)" if in_a_row > 1 else ""
    return UserError(
        f"{message}{several}",
        "look at these rows with `ftlaunch preview`, lower learning_rate or max_grad_norm, or set the stage's"
        ' on_nonfinite = "skip"; the checkpoints before this step are good',
    )
