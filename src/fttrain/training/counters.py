"""How far training has come: the counters that a checkpoint carries."""

import math
from dataclasses import dataclass
from typing import Any

from ftlaunch.recipe.stages import LOWER_IS_BETTER
from ftlaunch.run.records import Best


@dataclass
class Progress:
    """Counters of one stage, the same on every rank."""

    step: int = 0
    """Newest optimizer step, by which data and schedules go; skipped steps count."""
    updates: int = 0
    """Steps that moved the weights: the optimizer's own count, for Adam's bias correction; skipped steps do not."""
    tokens: int = 0
    best_by: str = "loss"
    """Score that the best evaluation is chosen by."""
    best_score: float | None = None
    best_step: int | None = None

    @classmethod
    def resumed(cls, state: dict[str, Any], best_by: str) -> "Progress":
        """Return the counters of a checkpoint. A best evaluation by another score is forgotten."""
        state = dict(state)
        if "best_loss" in state:  # as checkpoints of earlier versions have it
            state["best_score"] = state.pop("best_loss")
        progress = cls(**state)
        if progress.best_by != best_by:
            progress.best_by, progress.best_score, progress.best_step = best_by, None, None
        return progress

    def note(self, step: int, evaluation: dict[str, float]) -> bool:
        """Remember an evaluation; return whether it is the best so far."""
        score = evaluation.get(f"eval/{self.best_by}")
        if score is None or not math.isfinite(score):
            return False
        if self.best_score is not None:
            gain = score - self.best_score
            if (-gain if self.best_by in LOWER_IS_BETTER else gain) <= 0:
                return False
        self.best_score, self.best_step = score, step
        return True

    def best(self) -> Best | None:
        """Return the best evaluation; None where there was none."""
        if self.best_step is None or self.best_score is None:
            return None
        return Best(step=self.best_step, by=self.best_by, score=self.best_score)
