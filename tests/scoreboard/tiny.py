"""What the stock stacks train: a model of two layers, and the same eight batches for each."""

import hashlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

STEPS = 8
SAVE_EVERY = 2
BATCH = 4
LENGTH = 16
VOCABULARY = 64


class Stopped(Exception):
    """A run that was to leave after a save has left."""


def make_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def rows(steps: int) -> torch.Tensor:
    """Token ids, a batch for each step."""
    ids = torch.randint(VOCABULARY, (STEPS * BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return ids.repeat(-(-steps // STEPS), 1)


def batch(step: int) -> torch.Tensor:
    """Token ids of a step, counted from 0."""
    start = step % STEPS * BATCH
    return rows(STEPS)[start : start + BATCH]


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of all weights."""
    told = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        told.update(name.encode() + tensor.detach().float().contiguous().numpy().tobytes())
    return told.hexdigest()


def beat(folder: Path) -> None:
    """Leave a sign of life."""
    (folder / "beat").touch()


def slow_disk() -> None:
    """Where SLOW_DISK gives a number, whatever torch saves after so many files takes its time."""
    if "SLOW_DISK" not in os.environ:
        return
    save, allowed = torch.save, [None] * int(os.environ["SLOW_DISK"])

    def slow(*arguments, **options) -> None:
        if not allowed:
            time.sleep(30)
        else:
            allowed.pop()
        save(*arguments, **options)

    torch.save = slow


def ranks(count: int) -> list[dict[str, str]]:
    """The environment of each rank of a group on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
