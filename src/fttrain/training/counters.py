"""How far training has come: the counters that a checkpoint carries."""

from dataclasses import dataclass


@dataclass
class Progress:
    """Counters of one stage, the same on every rank."""

    step: int = 0
    """Newest optimizer step, by which data and schedules go; skipped steps count."""
    updates: int = 0
    """Steps that moved the weights: the optimizer's own count, for Adam's bias correction; skipped steps do not."""
    tokens: int = 0
    best_loss: float | None = None
    best_step: int | None = None

    def note(self, step: int, evaluation: dict[str, float]) -> bool:
        """Remember an evaluation; return whether it is the best so far."""
        loss = evaluation.get("eval/loss")
        if loss is None or (self.best_loss is not None and loss >= self.best_loss):
            return False
        self.best_loss, self.best_step = loss, step
        return True
