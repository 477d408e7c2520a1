"""Plain text to measure models with: cut into windows of tokens, and the perplexity of a model on them."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftlaunch.errors import UserError
from ftlaunch.rows.files import data_files
from ftlaunch.rows.readers import read_rows
from ftlaunch.rows.template import DataError

SHIPPED = Path(__file__).with_name("text.txt")
"""English prose of this project's own, where the user names no text."""


def windows(tokenizer: Any, source: Path | str | None, *, length: int, count: int) -> list[Tensor]:
    """Return at most `count` windows [1, length] of the text in `source`, each begun as the tokenizer begins texts.

    `source` is a plain text file, or a data file or folder, of which every row's texts count; None is the text that
    is shipped. A last window that is not full is left out, unless it is the only one. Raises UserError for a text that
    cannot be read, or is empty.
    """
    start = list(tokenizer("")["input_ids"])
    ids = tokenizer("\n".join(_read(Path(source or SHIPPED))), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise UserError(f"{source} holds no text to measure with", "name a longer one")
    # Each window is a text of its own with BOS, if the tokenizer has one: models are trained on nothing else.
    room = length - len(start)
    starts = range(0, max(len(ids) - room + 1, 1), room)
    return [torch.tensor([start + ids[at : at + room]]) for at in starts[:count]]


def _read(source: Path) -> Iterator[str]:
    try:
        if source.suffix == ".txt":
            yield source.read_text()
            return
        for file in data_files(source):
            for _, row in read_rows(file):
                yield " ".join(value for value in row.values() if isinstance(value, str))
    except DataError as error:
        raise UserError(f"{error.where}: {error.problem}", error.remedy) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{source} cannot be read as text: {error}", "name a .txt, .csv, .json or .jsonl file"
        ) from error


def perplexity(model: Any, windows: list[Tensor]) -> float:
    """Return exp of the mean cross-entropy of all tokens but each window's first; infinity where it overflows."""
    return perplexity_of(token_losses(model, window) for window in windows)


def perplexity_of(losses: Iterator[Tensor]) -> float:
    """Return exp of the mean of cross-entropies in nats, one tensor per window."""
    all_losses = torch.cat(list(losses))
    mean = float(all_losses.double().mean())
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def token_losses(model: Any, window_1T: Tensor) -> Tensor:
    """Return the cross-entropy of each token of a window [1, T] but the first: [T - 1], on the CPU."""
    ids = window_1T.to(model.device)
    logits = model(ids).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").cpu()
