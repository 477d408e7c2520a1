"""How far training has come: the counters that a checkpoint carries."""

from dataclasses import dataclass


@dataclass
class Progress:
    """Counters of one stage, the same on every rank."""

    step: int = 0
    """Optimizer steps that the data has come to."""
    updates: int = 0
    """Those that moved the weights: the optimizer's own count, which steps left out do not raise."""
    tokens: int = 0
    best_loss: float | None = None
    best_step: int | None = None

    def note(self, step: int, evaluation: dict[str, float]) -> bool:
        """Remember an evaluation; True if it is the best so far."""
        loss = evaluation.get("eval/loss")
        if loss is None or (self.best_loss is not None and loss >= self.best_loss):
            return False
        self.best_loss, self.best_step = loss, step
        return True
