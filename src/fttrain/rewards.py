"""Where scores come from: a Python function of prompt, answer and row."""

import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ftlaunch.errors import UserError
from ftlaunch.rows.fill import Row, text_at
from fttrain.data.prompts import Prompt
from fttrain.engine import Engine

Function = Callable[[str, str, Row], float]
"""(the prompt's last turn, the answer's text, the row) → score."""

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Said:
    """An answer to be scored."""

    prompt: Prompt
    text: str
    """Without special tokens."""


class Reward(Protocol):
    """What scores answers."""

    def __call__(self, engine: Engine, said: Sequence[Said]) -> Tensor:
        """[B]: scores in fp32, the same on every rank. Collective."""
        ...


class FunctionReward:
    """Scores by a function; each rank calls it for its share of the answers."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._function = SHIPPED.get(name) or _load(name)

    def __call__(self, engine: Engine, said: Sequence[Said]) -> Tensor:
        rank, size = engine.world.rank, engine.world.size
        mine = {index: self._score(said[index]) for index in range(rank, len(said), size)}
        scores = {index: score for part in engine.world.gather(mine) for index, score in part.items()}
        return torch.tensor([scores[index] for index in range(len(said))])

    def _score(self, one: Said) -> float:
        score = self._function(one.prompt.text, one.text, one.prompt.row)
        if isinstance(score, int | float) and math.isfinite(score):
            return float(score)
        message = f"reward_function {self._name} returned {score!r} for the answer to {one.prompt.where}"
        raise UserError(message, "let it return a finite number")


def gsm8k(prompt: str, answer: str, row: Row) -> float:  # noqa: ARG001 every reward's
    """1.0 where the answer's last number is the last one of the row's field "answer", else 0.0."""
    wanted, given = _last_number(text_at(row, ("answer",), "reward gsm8k")), _last_number(answer)
    return float(given is not None and given == wanted)


def _last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


SHIPPED: dict[str, Function] = {"gsm8k": gsm8k}


def _load(name: str) -> Function:
    """The function that "FILE.py:NAME" or "package.module:NAME" names."""
    place, _, function = name.rpartition(":")
    remedy = "correct reward_function; `ftlaunch validate` looks for the function as well"
    try:
        module = _module_of(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        return getattr(module, function)
    except (ImportError, OSError, AttributeError) as error:
        raise UserError(f"reward_function {name} cannot be loaded: {error}", remedy) from error


def _module_of(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
