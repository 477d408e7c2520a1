"""Attention of rows laid end to end: each row attends to itself alone, and no dense mask is ever made.

Registered with transformers under the name "segments", so no model code is touched. On a GPU in half precision it is
one variable-length kernel. Elsewhere rows of like length are set side by side, padded on the right: under a causal
kernel a real token never sees the padding behind it, so plain causal SDPA is exact.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "segments"
WASTE = 1.3
"""Rows share a call while the longest is at most so many times the shortest."""


@dataclass(frozen=True)
class Segments:
    """Where the rows of a packed micro-batch lie. T: tokens of all rows."""

    bounds: Tensor
    """Cumulative lengths, int32, [rows + 1]."""
    longest: int
    groups: tuple[Tensor, ...]
    """For each group of rows of like length: token index of every place, [rows, length]; padding repeats token 0."""
    scatter_T: Tensor
    """For each token its place in the groups' outputs laid end to end."""

    @staticmethod
    def of(lengths: list[int], device: torch.device) -> "Segments":
        """The layout of rows of these lengths, in this order."""
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        groups, scatter_T, used = [], torch.empty(starts[-1], dtype=torch.long), 0
        for members in _like_lengths(lengths):
            width = lengths[members[0]]
            places = torch.zeros(len(members), width, dtype=torch.long)
            for line, row in enumerate(members):
                here = slice(starts[row], starts[row + 1])
                places[line, : lengths[row]] = torch.arange(starts[row], starts[row + 1])
                scatter_T[here] = torch.arange(lengths[row]) + used + line * width
            groups.append(places.to(device))
            used += places.numel()
        bounds = torch.tensor(starts, dtype=torch.int32, device=device)
        return Segments(bounds, max(lengths), tuple(groups), scatter_T.to(device))


def _like_lengths(lengths: list[int]) -> list[list[int]]:
    """Rows grouped by length, the longest of each group first."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups: list[list[int]] = []
    for row in order:
        if groups and lengths[groups[-1][0]] <= WASTE * lengths[row]:
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
    """Causal attention within each row. `query` is [1, heads, T, width]; returns [1, T, heads, width]."""
    if softcap is not None or (sliding_window is not None and sliding_window < segments.longest):
        raise ValueError("packing does not cover soft-capped scores or a sliding window shorter than the rows")
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0.0:
        return _varlen(query, key, value, segments, scaling), None
    outputs = []
    q_THD, k_THD, v_THD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    for places in segments.groups:
        q, k, v = (tensor[places].transpose(1, 2) for tensor in (q_THD, k_THD, v_THD))
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=gqa)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[segments.scatter_T].unsqueeze(0), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    bounds, longest = segments.bounds, segments.longest
    gqa = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=gqa)
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


def _no_mask(*_args: object, **_kwargs: object) -> None:
    """The mask of "segments": none, whatever the model asks for."""


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
