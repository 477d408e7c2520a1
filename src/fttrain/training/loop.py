"""The training loop, once, for every training stage."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from ftlaunch.recipe.stages import Training
from ftlaunch.run.records import StepMetrics
from fttrain.checkpoint.store import Checkpoints
from fttrain.data.batches import MicroBatch
from fttrain.data.feed import Feed
from fttrain.distributed.stop_request import StoppedEarly, StopRequest
from fttrain.engine import Engine
from fttrain.training.counters import Progress
from fttrain.training.metrics import MetricsLog
from fttrain.training.nonfinite import NonFinitePolicy, StepOutcome
from fttrain.training.optim import Schedule
from fttrain.training.pace import PaceLog


class Objective(Protocol):
    """What distinguishes a stage's training from any other's: its loss and its metrics."""

    def weight(self, micro: MicroBatch) -> float:
        """Return this micro-batch's part of the divisor of the step's summed loss, such as its trained tokens."""
        ...

    def loss(self, engine: Engine, micro: MicroBatch) -> Tensor:
        """Return the micro-batch's loss as a sum, a scalar with gradient."""
        ...

    def measures(self, engine: Engine) -> dict[str, float]:
        """Return further metrics of the optimizer step just taken, the same on every rank."""
        ...

    def evaluate(self, engine: Engine, feed: Feed) -> dict[str, float]:
        """Return metrics of held-out rows, the same on every rank; {} if there are none."""
        ...


def fit(  # noqa: PLR0913 the parts that the loop joins; each is made, and tested, by itself
    objective: Objective,
    engine: Engine,
    feed: Feed,
    stage: Training,
    schedule: Schedule,
    checkpoints: Checkpoints,
    metrics: MetricsLog,
    stop: StopRequest,
    pace: PaceLog,
    progress: Progress,
) -> Progress:
    """Train from `progress` to the feed's last step. Raises StoppedEarly after the save that a stop request causes."""
    guard = NonFinitePolicy(stage.on_nonfinite, engine, feed, checkpoints)
    for step in range(progress.step + 1, feed.num_steps + 1):
        started = time.perf_counter()
        last_work = pace.told()
        with pace.working():
            micros = feed.step(step)
        # One collective per step carries the loss's divisor, the tokens, whether any rank was asked to stop, so that
        # all ranks agree on stopping after the same step, and how long each has worked.
        mine = [sum(map(objective.weight, micros)), sum(micro.tokens for micro in micros), float(bool(stop.poll()))]
        weight, tokens, stopping, *seconds = engine.world.sum([*mine, *last_work])
        pace.note(step, seconds)
        engine.set_learning_rate(schedule(step))
        engine.scorer.disturbance.begin(step, feed.num_steps)
        outcome = _take(objective, engine, micros, weight, pace.working)
        progress.step, progress.tokens = step, progress.tokens + int(tokens)
        progress.updates += outcome.is_finite
        trouble = guard.handle(outcome, micros, progress)
        measured = {name: _or_none(value) for name, value in objective.measures(engine).items()}
        measured |= engine.measures() | engine.scorer.disturbance.measures()
        line = StepMetrics(
            step=step,
            steps=feed.num_steps,
            loss=_or_none(outcome.loss),
            learning_rate=schedule(step),
            grad_norm=_or_none(outcome.grad_norm),
            tokens=progress.tokens,
            tokens_per_second=tokens / (time.perf_counter() - started),
            epoch=feed.epoch_at(step),
            peak_memory_bytes=_peak_memory(engine),
        )
        metrics.write(step, {**line, **measured, **trouble})
        last = step == feed.num_steps
        improved = False
        if last or (stage.evaluate_every and step % stage.evaluate_every == 0):
            evaluation = objective.evaluate(engine, feed)
            improved = progress.note(step, evaluation)
            if evaluation:
                metrics.write(step, evaluation)
        # A save from an earlier step may have been written by now; its next phase needs all ranks, and they are here.
        checkpoints.advance()
        if last or stopping or improved or step % stage.save_every == 0:
            state = vars(progress).copy()
            checkpoints.save(step, state, keep=stage.keep, best=progress.best_step, is_last=last or bool(stopping))
        if stopping and not last:
            raise StoppedEarly(_reason(engine, stop), step)
    return progress


def _take(
    objective: Objective,
    engine: Engine,
    micros: list[MicroBatch],
    weight: float,
    working: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> StepOutcome:
    """Take one optimizer step: gradients of every micro-batch, then the update. `working` is open in forward passes."""
    # Losses are divided by the whole step's weight before the backward pass, so gradients add up to those of the mean
    # over all rows, however rows are spread over micro-batches and ranks.
    parts = []
    for index, micro in enumerate(micros):
        last = index == len(micros) - 1
        with engine.accumulating(last=last):
            with working():
                part = objective.loss(engine, micro) / weight
            engine.backward(part, last=last)
        parts.append(part.detach())
    losses = torch.stack(parts).tolist()  # the one wait for a GPU in a step
    (loss,) = engine.world.sum([sum(losses)])
    grad_norm = engine.step(discard=not math.isfinite(loss))
    return StepOutcome(loss, grad_norm, [m for m, part in zip(micros, losses, strict=True) if not math.isfinite(part)])


def _or_none(value: float) -> float | None:
    """Return the value, or None for nan and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def _peak_memory(engine: Engine) -> int:
    """Return the peak memory, in bytes, of the rank that used most: of its GPU, or of its process on a CPU."""
    if engine.world.device.type == "cuda":
        return int(engine.world.max(torch.cuda.max_memory_allocated()))
    import resource

    return int(engine.world.max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def _reason(engine: Engine, stop: StopRequest) -> str:
    reasons: list[Any] = engine.world.gather(stop.poll())
    return next(reason for reason in reasons if reason)
