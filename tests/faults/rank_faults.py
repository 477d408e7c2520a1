"""Faults on order: what happens to which rank at which point. A rank installs them before it starts."""

import math
import os
import signal
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch


class Fault(NamedTuple):
    """One thing that goes wrong once."""

    do: Literal["kill", "freeze", "ask", "slow", "nan loss", "nan gradient", "clock jump", "nan pass"]
    step: int
    """Optimizer step."""
    rank: int = 0
    at: Literal["start", "begin", "save"] = "begin"
    """Before the rank does anything, before the step's forward pass, or when its save is on the way."""


def install(faults: list[Fault], rank: int) -> None:
    """Have the faults that concern this rank happen."""
    mine = [fault for fault in faults if fault.rank == rank]
    for fault in mine:
        if fault.at == "start":
            ACTS[fault.do]()
    _call_at("begin", [fault for fault in mine if fault.at == "begin"])
    _call_at("save", [fault for fault in mine if fault.at == "save"])


def _call_at(point: str, faults: list[Fault]) -> None:
    from fttrain.checkpoint.store import Checkpoints
    from fttrain.data.feed import TableFeed
    from fttrain.ppo.feed import RolloutFeed

    acts = {fault.step: ACTS[fault.do] for fault in faults}
    if point == "begin":
        for feed in (TableFeed, RolloutFeed):
            _wrap(feed, "step", before=lambda _feed, number: acts.get(number, _nothing)())
    else:
        _wrap(Checkpoints, "save", after=lambda _store, number, *_: acts.get(number, _nothing)())


def _wrap(
    owner: type, name: str, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None
) -> None:
    method = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if before:
            before(*arguments)
        result = method(*arguments, **named)
        if after:
            after(*arguments)
        return result

    setattr(owner, name, wrapped)


def _nothing() -> None:
    pass


def _signal(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _spoil_loss() -> None:
    """The next micro-batch's loss is not a number."""
    from fttrain.stages.sft import CrossEntropy

    sound = CrossEntropy.loss

    def spoilt(self: CrossEntropy, *arguments: Any) -> torch.Tensor:
        CrossEntropy.loss = sound
        return sound(self, *arguments) * math.nan

    CrossEntropy.loss = spoilt


def _spoil_gradient() -> None:
    """The next backward pass gives a gradient that is infinite, of a loss that is not."""
    from fttrain.stages.sft import CrossEntropy

    sound = CrossEntropy.loss

    def spoilt(self: CrossEntropy, *arguments: Any) -> torch.Tensor:
        CrossEntropy.loss = sound
        return _InfiniteGradient.apply(sound(self, *arguments))

    CrossEntropy.loss = spoilt


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(_ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf


def _spoil_packed_passes() -> None:
    """Passes over packed rows give hidden states that are not numbers."""
    from fttrain.model import packing

    sound = packing.pass_over

    def spoilt(*arguments: Any) -> Any:
        passed = sound(*arguments)
        passed.last_hidden_state = passed.last_hidden_state * math.nan
        return passed

    packing.pass_over = spoilt


def _jump() -> None:
    """The wall clock goes back by a day."""
    real = time.time
    time.time = lambda: real() - 86400


ACTS: dict[str, Callable[[], None]] = {
    "kill": _signal(signal.SIGKILL),
    "freeze": _signal(signal.SIGSTOP),
    "ask": _signal(signal.SIGUSR2),
    "slow": lambda: time.sleep(2),
    "nan loss": _spoil_loss,
    "nan gradient": _spoil_gradient,
    "clock jump": _jump,
    "nan pass": _spoil_packed_passes,
}
