"""Attention of rows laid end to end: each attends to itself and, if it has one, to its prefix, a part of another row.

No mask of the whole line is ever made: where two answers share a prompt, the second is laid without it and sees the
keys and values of the first one's.

Registered with transformers under the name "segments", so no model code is touched. On a GPU in half precision it is
one variable-length kernel. Elsewhere rows of like length are set side by side, padded on the right: under a causal
kernel a real token never sees the padding behind it, so plain causal SDPA is exact.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "segments"
WASTE = 1.3
"""Rows share a call while the longest is at most so many times the shortest."""


Prefix = tuple[int, int]
"""(first token, number of tokens) of the part of an earlier row that a row goes on from; (0, 0) for none."""


@dataclass(frozen=True)
class Block:
    """Rows of like length, attended to in one call. Short rows are padded by repeating token 0."""

    queries: Tensor
    """[rows, Tq]: token index of every place."""
    keys: Tensor
    """[rows, Tk]: of the prefix, then of the row itself."""
    mask: Tensor | None
    """[rows, 1, Tq, Tk], True where a query sees a key; None where no row has a prefix: plainly causal."""


@dataclass(frozen=True)
class Segments:
    """Where the rows of a packed micro-batch lie. T: tokens of all rows, K: keys that they see."""

    bounds: Tensor
    """Cumulative lengths, int32, [rows + 1]."""
    longest: int
    keys_K: Tensor
    """Token index of every row's keys, its prefix's first, end to end."""
    key_bounds: Tensor
    """Cumulative numbers of keys, int32, [rows + 1]."""
    most_keys: int
    blocks: tuple[Block, ...]
    scatter_T: Tensor
    """For each token its place in the blocks' outputs laid end to end."""

    @staticmethod
    def of(lengths: list[int], device: torch.device, prefixes: list[Prefix] | None = None) -> "Segments":
        """The layout of rows of these lengths, in this order. A row sees its prefix whole, and itself causally."""
        prefixes = prefixes or [(0, 0)] * len(lengths)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        blocks, scatter, used = [], np.empty(starts[-1], dtype=np.int64), 0
        for members in _like_lengths(lengths, [length for _, length in prefixes]):
            own = [(int(starts[row]), lengths[row]) for row in members]
            blocks.append(_block([prefixes[row] for row in members], own, device))
            width = blocks[-1].queries.shape[1]
            for line, (start, length) in enumerate(own):
                scatter[start : start + length] = np.arange(length) + used + line * width
            used += len(members) * width
        keys = [_ranges(prefixes[row], (int(starts[row]), lengths[row])) for row in range(len(lengths))]
        return Segments(
            bounds=torch.tensor(starts, dtype=torch.int32, device=device),
            longest=max(lengths),
            keys_K=torch.from_numpy(np.concatenate(keys)).to(device),
            key_bounds=torch.tensor(np.cumsum([0, *map(len, keys)]), dtype=torch.int32, device=device),
            most_keys=max(map(len, keys)),
            blocks=tuple(blocks),
            scatter_T=torch.from_numpy(scatter).to(device),
        )


def _ranges(*ranges: Prefix) -> np.ndarray:
    return np.concatenate([np.arange(start, start + length) for start, length in ranges])


def _block(prefixes: list[Prefix], own: list[Prefix], device: torch.device) -> Block:
    wide, long = max(length for _, length in prefixes), max(length for _, length in own)
    queries = np.zeros((len(own), long), dtype=np.int64)
    keys = np.zeros((len(own), wide + long), dtype=np.int64)
    mask = np.zeros((len(own), 1, long, wide + long), dtype=bool)
    mask[..., wide:] = np.tri(long, dtype=bool)
    for line, (prefix, (start, length)) in enumerate(zip(prefixes, own, strict=True)):
        queries[line, :length] = keys[line, wide : wide + length] = np.arange(start, start + length)
        keys[line, : prefix[1]] = _ranges(prefix)
        mask[line, ..., : prefix[1]] = True
    seen = torch.from_numpy(mask).to(device) if wide else None
    return Block(torch.from_numpy(queries).to(device), torch.from_numpy(keys).to(device), seen)


def _like_lengths(lengths: list[int], prefixes: list[int]) -> list[list[int]]:
    """Rows grouped by length, and by the length of their prefix; the longest of each group first."""
    order = sorted(range(len(lengths)), key=lambda row: (-prefixes[row], -lengths[row]))
    groups: list[list[int]] = []
    for row in order:
        first = groups[-1][0] if groups else row
        alike = lengths[row] <= lengths[first] <= WASTE * lengths[row] and prefixes[first] <= WASTE * prefixes[row]
        if groups and alike:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def attend(
    module: nn.Module,  # noqa: ARG001 the interface's
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 the interface's; always None here
    *,
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention to the own row, causally, and its prefix: [1, heads, T, width] each → [1, T, heads, width]."""
    if softcap is not None or (sliding_window is not None and sliding_window < segments.most_keys):
        raise ValueError("packing does not cover soft-capped scores or a sliding window shorter than the rows")
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0.0:
        return _varlen(query, key, value, segments, scaling), None
    outputs = []
    q_THD, k_THD, v_THD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    for block in segments.blocks:
        q = q_THD[block.queries].transpose(1, 2)
        k, v = (tensor[block.keys].transpose(1, 2) for tensor in (k_THD, v_THD))
        gqa, causal = q.shape[1] != k.shape[1], block.mask is None
        out = F.scaled_dot_product_attention(q, k, v, block.mask, dropout, causal, scale=scaling, enable_gqa=gqa)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[segments.scatter_T].unsqueeze(0), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q = query[0].transpose(0, 1).contiguous()
    k, v = (tensor[0].transpose(0, 1)[segments.keys_K] for tensor in (key, value))
    out = varlen_attn(
        q,
        k,
        v,
        segments.bounds,
        segments.key_bounds,
        segments.longest,
        segments.most_keys,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


def _no_mask(*_args: object, **_kwargs: object) -> None:
    """The mask of "segments": none, whatever the model asks for."""


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
