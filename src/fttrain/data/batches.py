"""Rows → micro-batches: who computes which rows of a step, and how they lie in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fttrain.attention import Segments
from fttrain.objectives.logps import num_chunks

Tokens = tuple[np.ndarray, np.ndarray]
"""(ids [T], trained [T]) of one row."""


@dataclass(frozen=True)
class Micro:
    """One forward pass of one process. Packed rows lie end to end in one line; padded ones are padded on the right."""

    input_ids: Tensor
    """[lines, T]"""
    position_ids: Tensor
    """[lines, T], starting anew with each row."""
    lengths: Tensor
    """[lines, T]: for each token the length of its row; 0 on padding."""
    segments: Segments | None
    """Where packed rows lie; None where rows are padded."""
    places_N: Tensor
    """Flat indices of the positions that predict a trained token."""
    targets_N: Tensor
    """The trained tokens."""
    chunks: int
    """Calls of the head that all ranks make for their micro-batch of this number."""
    tokens: int
    """Real tokens, without padding."""
    rows: tuple[int, ...] = ()
    """Which of the step's rows these are."""


def supervised(tokens: Tokens) -> int:
    """Trained tokens of a row that something predicts: all but its first token."""
    return int(np.count_nonzero(tokens[1][1:]))


def share_out(lengths: Sequence[int], slots: int) -> list[list[int]]:
    """Give rows to slots so that the slots' tokens are even: longest first, each to the lightest slot.

    Every slot gets at most ceil(rows / slots) rows. Which rank computes a row changes nothing but the time.
    """
    limit = -(-len(lengths) // slots)
    loads = [0] * slots
    members: list[list[int]] = [[] for _ in range(slots)]
    for row in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        slot = min((s for s in range(slots) if len(members[s]) < limit), key=lambda s: (loads[s], s))
        members[slot].append(row)
        loads[slot] += lengths[row]
    return members


def lay_out(
    rows: Sequence[Tokens], *, rank: int, world_size: int, accumulation: int, packing: bool, device: torch.device
) -> list[Micro]:
    """This rank's micro-batches of one optimizer step over `rows`, the same number on every rank.

    Micro-batch j of rank r is slot j·world_size + r. A slot without a row computes one token and trains nothing.
    """
    slots = share_out([len(ids) for ids, _ in rows], world_size * accumulation)
    micros = []
    for index in range(accumulation):
        of_all = slots[index * world_size : (index + 1) * world_size]
        chunks = max(num_chunks(sum(supervised(rows[row]) for row in slot)) for slot in of_all)
        mine = [rows[row] for row in of_all[rank]]
        micro = collate(mine, packing=packing, chunks=chunks, device=device)
        micros.append(replace(micro, rows=tuple(of_all[rank])))
    return micros


def collate(rows: Sequence[Tokens], *, packing: bool, chunks: int, device: torch.device) -> Micro:
    """Lay rows out in one micro-batch; no rows make a single token that trains nothing."""
    rows = rows or [(np.zeros(1, dtype=np.int32), np.zeros(1, dtype=bool))]
    lengths = [len(ids) for ids, _ in rows]
    width = sum(lengths) if packing else max(lengths)
    lines = 1 if packing else len(rows)
    ids, positions, owners = (np.zeros((lines, width), dtype=np.int64) for _ in range(3))
    places, targets, start = [], [], 0
    for number, (row_ids, trained) in enumerate(rows):
        line, left = (0, start) if packing else (number, 0)
        here = slice(left, left + len(row_ids))
        ids[line, here], positions[line, here], owners[line, here] = row_ids, np.arange(len(row_ids)), len(row_ids)
        predicted = np.flatnonzero(trained[1:])
        places.append(predicted + left + line * width)
        targets.append(row_ids[predicted + 1])
        start += len(row_ids)
    return Micro(
        input_ids=torch.from_numpy(ids).to(device),
        position_ids=torch.from_numpy(positions).to(device),
        lengths=torch.from_numpy(owners).to(device),
        segments=Segments.of(lengths, device) if packing else None,
        places_N=torch.from_numpy(np.concatenate(places)).to(device),
        targets_N=torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(device),
        chunks=chunks,
        tokens=sum(lengths),
    )
