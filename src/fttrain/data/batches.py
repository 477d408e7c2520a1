"""Rows → micro-batches: who computes which rows of a step, and how they lie in memory."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fttrain.data.drawn import Drawn
from fttrain.data.segments import Segments
from fttrain.data.token_set import Group, Tokens
from fttrain.objectives.logps import num_chunks


@dataclass(frozen=True)
class Layout:
    """How rows lie in memory."""

    packing: bool
    """End to end in one line; else each in a line of its own, padded on the right."""
    share: bool = False
    """What the rows of a group begin with is laid down once."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one process. Packed rows lie end to end in one line; padded ones are padded on the right."""

    input_ids: Tensor
    """[lines, T]"""
    position_ids: Tensor
    """[lines, T], from 0 in each row; on padding they go on counting, so that a padded line is one row."""
    lengths: Tensor
    """[lines, T]: for each token the length of its row; 0 on padding."""
    segments: Segments | None
    """Where packed rows lie; None where rows are padded."""
    positions_N: Tensor
    """Flat indices of the positions that predict a trained token."""
    targets_N: Tensor
    """The trained tokens."""
    row_ids_N: Tensor
    """The number of each trained token's row."""
    last_token_B: Tensor
    """Flat index of each row's last token."""
    margins_G: Tensor
    """float32: how much better the first row of each group is than its second."""
    references_B: Tensor | None
    """float32: log-probability of each row's answer under the reference, where the rows came with one."""
    chunks: int
    """Calls of the head that all ranks make for their micro-batch of this number."""
    tokens: int
    """Tokens of all rows, without padding; what rows share counts for each of them."""
    lines: int = 0
    """Rows of the largest micro-batch of this number on any rank, where that is more than here."""
    rows: tuple[int, ...] = ()
    """Which of the step's rows or pairs these are."""


def supervised(tokens: Tokens) -> int:
    """Trained tokens of a row that something predicts: all but its first token."""
    return int(np.count_nonzero(tokens[1][1:]))


def balance(lengths: Sequence[int], slots: int) -> list[list[int]]:
    """Give rows to slots so that the slots' tokens are even: longest first, each to the lightest slot.

    Every slot gets at most ceil(rows / slots) rows. Which rank computes a row changes nothing but the time.
    """
    limit = -(-len(lengths) // slots)
    members: list[list[int]] = [[] for _ in range(slots)]
    # The greedy rule for even loads: with the longest rows placed first, short ones fill the gaps at the end. The limit
    # on rows keeps a slot of many short rows from needing much more memory than the others.
    open_slots = [(0, slot) for slot in range(slots)]
    """A heap of (tokens so far, slot) with those that are not full."""
    for row in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        load, slot = heapq.heappop(open_slots)
        members[slot].append(row)
        if len(members[slot]) < limit:
            heapq.heappush(open_slots, (load + lengths[row], slot))
    return members


def split_batch(
    groups: Sequence[Group],
    *,
    rank: int,
    world_size: int,
    accumulation: int,
    packing: bool,
    device: torch.device,
    share: bool = False,
) -> list[MicroBatch]:
    """This rank's micro-batches of one optimizer step over `groups`, the same number on every rank.

    Micro-batch j of rank r is slot j·world_size + r. A slot without a group computes one token and trains nothing.
    """
    # Every rank computes the whole assignment and takes its own slots: nothing is sent. Micro-batch j runs on all
    # ranks at the same time, so its slots are neighbours, and all make as many calls of the head as the largest needs.
    slots = balance(_sizes(groups, share=share), world_size * accumulation)
    predicted = groups.supervised if isinstance(groups, Drawn) else [_predicted(group) for group in groups]
    micros = []
    for index in range(accumulation):
        of_all = slots[index * world_size : (index + 1) * world_size]
        chunks = max(num_chunks(sum(predicted[place] for place in slot)) for slot in of_all)
        mine = [groups[place] for place in of_all[rank]]
        micro = collate(mine, packing=packing, share=share, chunks=chunks, device=device)
        lines = max(map(len, of_all)) * (len(mine[0].rows) if mine else 1)
        micros.append(replace(micro, rows=tuple(of_all[rank]), lines=lines))
    return micros


def _predicted(group: Group) -> int:
    """Trained tokens of a group that something predicts."""
    return sum(map(supervised, group.rows))


def _sizes(groups: Sequence[Group], *, share: bool) -> list[int]:
    """Tokens that are computed for each group."""
    if isinstance(groups, Drawn) and not share:
        return groups.lengths
    return [sum(len(ids) for ids, _ in group.rows) - sum(_shared(group, share=share)) for group in groups]


def _shared(group: Group, *, share: bool) -> list[int]:
    """Return how many tokens each row of a group has in common with the beginning of the first, all but its last."""
    (first, _), *others = group.rows
    if not share:
        return [0] * len(group.rows)
    return [0, *(_in_common(first, ids) for ids, _ in others)]


def _in_common(first: np.ndarray, other: np.ndarray) -> int:
    end = min(len(first), len(other) - 1)  # the last token stays its own: something of the row must be laid down
    apart = np.flatnonzero(first[:end] != other[:end])
    return int(apart[0]) if len(apart) else end


def collate(
    groups: Sequence[Group], *, packing: bool, chunks: int, device: torch.device, share: bool = False
) -> MicroBatch:
    """Lay groups out in one micro-batch; none make a single token that trains nothing.

    With `share`, what the rows of a group begin with is laid down once, with its first row.
    """
    rows = [row for group in groups for row in group.rows]
    laid = _packed(groups or [EMPTY], device, share=share) if packing else _padded(rows or EMPTY.rows)
    # All indices are flat, over lines · T. A row's tokens go to its places; in a packed line with shared prefixes the
    # places of a prefix belong to several rows, which all write the same tokens there.
    ids, lengths = (np.zeros(laid.shape, dtype=np.int64) for _ in range(2))
    positions = np.tile(np.arange(laid.shape[1]), (laid.shape[0], 1))
    for (row_ids, _), places in zip(rows, laid.places, strict=False):
        ids.flat[places], positions.flat[places], lengths.flat[places] = row_ids, np.arange(len(places)), len(places)
    # Token t + 1 is predicted at position t: so positions are places[at], and targets ids[at + 1].
    predicted = [np.flatnonzero(trained[1:]) for _, trained in rows]
    return MicroBatch(
        input_ids=torch.from_numpy(ids).to(device),
        position_ids=torch.from_numpy(positions).to(device),
        lengths=torch.from_numpy(lengths).to(device),
        segments=laid.segments,
        positions_N=_joined([places[at] for places, at in zip(laid.places, predicted, strict=False)], device),
        targets_N=_joined([row_ids[at + 1] for (row_ids, _), at in zip(rows, predicted, strict=True)], device),
        row_ids_N=_joined([np.full(len(at), number) for number, at in enumerate(predicted)], device),
        last_token_B=_joined([places[-1:] for places, _ in zip(laid.places, rows, strict=False)], device),
        margins_G=torch.tensor([group.margin for group in groups], dtype=torch.float32, device=device),
        references_B=_references(groups, device),
        chunks=chunks,
        tokens=max(1, sum(len(ids) for ids, _ in rows)),
    )


EMPTY = Group(((np.zeros(1, dtype=np.int32), np.zeros(1, dtype=bool)),))


@dataclass(frozen=True)
class _Laid:
    """Where rows lie."""

    shape: tuple[int, int]
    """(lines, T)."""
    places: list[np.ndarray]
    """The flat index of each token of each row, shared ones included."""
    segments: Segments | None


def _padded(rows: Sequence[Tokens]) -> _Laid:
    width = max(len(ids) for ids, _ in rows)
    places = [number * width + np.arange(len(ids)) for number, (ids, _) in enumerate(rows)]
    return _Laid((len(rows), width), places, None)


def _packed(groups: Sequence[Group], device: torch.device, *, share: bool) -> _Laid:
    places: list[np.ndarray] = []
    lengths: list[int] = []
    prefixes: list[tuple[int, int]] = []
    # The first row of a group is laid down whole. Each other row lays down only what differs from it, and sees the
    # common beginning as its prefix: (first token of the group, number of tokens in common).
    for group in groups:
        begin = sum(lengths)
        for (ids, _), common in zip(group.rows, _shared(group, share=share), strict=True):
            start = sum(lengths)
            lengths.append(len(ids) - common)
            prefixes.append((begin, common) if common else (0, 0))
            places.append(np.concatenate([np.arange(begin, begin + common), np.arange(start, start + lengths[-1])]))
    return _Laid((1, sum(lengths)), places, Segments.of(lengths, device, prefixes))


def _joined(parts: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """The parts end to end, int64."""
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64)).to(device)


def _references(groups: Sequence[Group], device: torch.device) -> Tensor | None:
    if any(group.reference is None for group in groups):
        return None
    values = [value for group in groups for value in group.reference or ()]
    return torch.tensor(values, dtype=torch.float32, device=device)
