"""The probes on which a merged model and the adapter model are compared: fixed texts, and held-out rows."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftlaunch.errors import UserError
from ftlaunch.recipe.stages import Merge, Ppo
from ftlaunch.run import snapshot
from ftlaunch.run.layout import StageDir
from fttrain import artifact
from fttrain.data import tokens
from fttrain.data.sources import settled
from fttrain.model.scorer import load_tokenizer

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog, who had seen it all before, went back to sleep.",
    "name[The Copper Kettle], food[Italian], area[riverside], rating[high]",
    "def area(width, height):\n    return width * height\n\nprint(area(3, 4))",
    "In 1969 two people walked on the Moon while a third kept watch from orbit; they brought back 21.5 kg of rock.",
)
ROWS = 8
LENGTH = 64
"""Tokens of a row at most: the logits of all probes are in memory three times."""


def probes(tokenizer: Any, adapter: Path) -> list[Tensor]:
    """Return the token ids of each probe, [1, T]."""
    texts = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
    return texts + [torch.tensor([ids[:LENGTH]]) for ids in _held_out(adapter)]


def _held_out(adapter: Path) -> list[list[int]]:
    """Return token ids of some held-out rows of the stage that made this artifact; [] where it has none."""
    folder = StageDir(adapter.parent)
    if folder.artifact != adapter or not folder.step.exists():
        return []
    try:
        return list(islice(_test_rows(folder), ROWS))
    except (UserError, OSError) as error:
        print(f"the held-out rows cannot be read, so only fixed texts are compared: {error}")
        return []


def _test_rows(folder: StageDir) -> Iterator[list[int]]:
    step = snapshot.redirect(folder.read_spec(), folder.run)
    if isinstance(step.stage, Merge | Ppo):
        return
    origin = artifact.origin(step, folder)
    for data in step.data.values():
        if data.test and not data.streaming:
            tokenizer = load_tokenizer(origin.tokenizer, origin.base.revision)
            test = tokens.tokenize(settled(data), tokenizer, step.seed, tokens.cache_root()).test
            for index in range(len(test)):
                yield from (ids_T.tolist() for ids_T, _ in test.group(index).rows)
