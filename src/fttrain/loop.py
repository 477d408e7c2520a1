"""The training loop, once, for every training stage."""

import math
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ftlaunch.errors import UserError
from fttrain.checkpoint import Checkpoints
from fttrain.data.batches import Micro
from fttrain.data.feed import Feed
from fttrain.engine import Engine
from fttrain.leave import Stopped, StopRequest
from fttrain.metrics import MetricsLog
from fttrain.optim import Schedule


class Objective(Protocol):
    """What a stage is made of besides the loop."""

    def weight(self, micro: Micro) -> float:
        """What this micro-batch's summed loss is divided by, before it is added up over the whole step."""
        ...

    def loss(self, engine: Engine, micro: Micro) -> Tensor:
        """The micro-batch's loss as a sum, a scalar with gradient."""
        ...

    def evaluate(self, engine: Engine, feed: Feed) -> dict[str, float]:
        """Metrics of the rows held out, the same on every rank; empty if there are none. "eval/loss" ranks them."""
        ...


@dataclass(frozen=True)
class Habits:
    """When the loop does what besides training."""

    evaluate_every: int | None
    save_every: int
    keep: int


@dataclass
class Progress:
    """Counters that a checkpoint carries."""

    step: int = 0
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


def fit(
    objective: Objective,
    engine: Engine,
    feed: Feed,
    schedule: Schedule,
    checkpoints: Checkpoints,
    metrics: MetricsLog,
    stop: StopRequest,
    habits: Habits,
    progress: Progress,
) -> Progress:
    """Train from where `progress` is to the feed's last step. Raises Stopped after a save that was asked for."""
    for step in range(progress.step + 1, feed.num_steps + 1):
        started = time.perf_counter()
        micros = feed.step(step)
        mine = [sum(map(objective.weight, micros)), sum(micro.tokens for micro in micros), float(bool(stop.asked()))]
        weight, tokens, asked = engine.world.sum(mine)
        engine.set_learning_rate(schedule(step))
        loss = _accumulate(objective, engine, micros, weight, step)
        grad_norm = engine.step()
        progress.step, progress.tokens = step, progress.tokens + int(tokens)
        metrics.write(
            step,
            {
                "steps": feed.num_steps,
                "loss": loss,
                "learning_rate": schedule(step),
                "grad_norm": grad_norm,
                "tokens": progress.tokens,
                "tokens_per_second": tokens / (time.perf_counter() - started),
                "epoch": feed.epoch_at(step),
                "peak_memory_bytes": _peak_memory(engine),
            },
        )
        last = step == feed.num_steps
        improved = False
        if last or (habits.evaluate_every and step % habits.evaluate_every == 0):
            evaluation = objective.evaluate(engine, feed)
            improved = progress.note(step, evaluation)
            if evaluation:
                metrics.write(step, evaluation)
        if last or asked or improved or step % habits.save_every == 0:
            checkpoints.save(step, vars(progress), keep=habits.keep, best=progress.best_step)
        if asked and not last:
            raise Stopped(_reason(engine, stop), step)
    return progress


def _accumulate(objective: Objective, engine: Engine, micros: list[Micro], weight: float, step: int) -> float:
    """Gradients of one optimizer step; returns its loss over all ranks, the same on each."""
    loss = torch.zeros((), device=engine.world.device)
    for index, micro in enumerate(micros):
        last = index == len(micros) - 1
        with engine.accumulating(last=last):
            part = objective.loss(engine, micro) / weight
            engine.backward(part, last=last)
        loss += part.detach()
    (total,) = engine.world.sum([float(loss)])
    if not math.isfinite(total):
        raise UserError(
            f"the loss of step {step} is {total}: training cannot go on",
            "lower learning_rate or max_grad_norm, or look at the data with `ftlaunch preview`; the checkpoints before"
            " this step are good",
        )
    return total


def _peak_memory(engine: Engine) -> int:
    """Peak memory in bytes of the process that used most: of the GPU, or of the process itself on a CPU."""
    if engine.world.device.type == "cuda":
        return int(engine.world.max(torch.cuda.max_memory_allocated()))
    import resource

    return int(engine.world.max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def _reason(engine: Engine, stop: StopRequest) -> str:
    reasons: list[Any] = engine.world.gather(stop.asked())
    return next(reason for reason in reasons if reason)
