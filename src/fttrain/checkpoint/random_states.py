"""Every generator that training may draw from: its state as a tensor, and new states where the old do not apply."""

import random

import numpy as np
import torch
from torch import Tensor


def take() -> dict[str, Tensor]:
    """States of torch, Python, NumPy and the GPU, as byte or word tensors."""
    _, keys, position, *_ = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
        "numpy": torch.tensor([*keys.tolist(), position], dtype=torch.int64),  # type: ignore[union-attr]
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: dict[str, Tensor]) -> None:
    """Go on from states that `take` returned."""
    torch.set_rng_state(states["torch"])
    random.setstate((3, tuple(states["python"].tolist()), None))  # 3: the version of Python's own format
    *keys, position = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, 0, 0.0))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def begin(seed: int, *place: int) -> None:
    """Seed every generator from the recipe's seed and from numbers, such as step and rank, that identify this start."""
    # A SeedSequence mixes its words: seed + rank would give rank 1 of seed 0 the numbers of rank 0 of seed 1.
    words = np.random.SeedSequence([seed, *place]).generate_state(3)
    torch.manual_seed(int(words[0]))  # the GPUs' as well
    random.seed(int(words[1]))
    np.random.seed(words[2])
