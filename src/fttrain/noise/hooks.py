"""Noise at work: hooks on the modules that a recipe names, awake in training only."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ftlaunch.recipe.noise import Noise, NoNoise, Saturated
from fttrain.noise.kinds import add_noise
from fttrain.noise.row_index import Places


class ActivationNoise:
    """The noise that a model has in training. This one has none; others inherit from it."""

    def begin(self, step: int, num_steps: int) -> None:
        """Make ready for optimizer step `step`, counted from 1, of `num_steps`."""

    def loss(self, ask: Callable[[], Tensor]) -> Tensor:
        """Return the loss of a micro-batch; `ask` computes the model's own."""
        return ask()

    def measures(self) -> dict[str, float]:
        """Return what metrics.jsonl says of the noise in the current step."""
        return {}


class ScheduledNoise(ActivationNoise):
    """Noise whose strength follows the recipe's schedule: all of it in the first step."""

    def __init__(self, schedule: str) -> None:
        self._schedule = schedule
        self.strength = 1.0

    def begin(self, step: int, num_steps: int) -> None:
        self.strength = strength(self._schedule, (step - 1) / num_steps)  # full in the first step, never quite 0

    def measures(self) -> dict[str, float]:
        return {"noise/scale": self.strength}


def strength(schedule: str, done: float) -> float:
    """Return the share of the noise that is left when the share `done` of the stage's optimizer steps is done."""
    match schedule:
        case "linear":
            return 1 - done
        case "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        case _:
            return 1.0


class SampledNoise(ScheduledNoise):
    """Noise that is drawn in each forward pass from torch's generator of this rank.

    So checkpoints carry its state, and activation checkpointing, which sets the generator back, draws the same noise.
    """

    def __init__(self, noise: Noise, modules: Iterable[nn.Module], places: Places) -> None:
        assert not isinstance(noise, NoNoise | Saturated)
        super().__init__(noise.schedule)
        self._noise = noise
        self._places = places
        for module in modules:
            module.register_forward_hook(self._disturb)

    def _disturb(self, module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not module.training:
            return output
        return with_first(output, add_noise(first(output), self._noise, self.strength, self._places))


def first(output: Any) -> Tensor:
    """Return the activation in a module's output: the output itself, or the first item of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_first(output: Any, activation: Tensor) -> Any:
    """Return a module's output with another activation, of the same shape, in it."""
    return (activation, *output[1:]) if isinstance(output, tuple) else activation
