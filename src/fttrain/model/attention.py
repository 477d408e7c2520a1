"""Attention of rows laid end to end: each attends to itself and, if it has one, to its prefix, a part of another row.

It is registered with transformers under the name "segments", so no model code changes. When a model asks transformers
for a mask, it gets a `RowMask`, which says where the rows lie and which keys of its row a query sees. The model hands
the mask to its layers, and they hand it to `attend`. A model that reads the mask itself, makes its own or needs what
`attend` does not compute raises `Unpackable`: nothing that a model asks for may be dropped in silence.

On a GPU in half precision it is one variable-length kernel. Elsewhere pieces of similar length form a batch, padded on
the right: under a causal mask a real token never sees the padding after it, so plain causal SDPA is exact.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from fttrain.data.segments import Block, Reach, Segments

NAME = "segments"
WIDEST, UNIT = 256, 8
"""Largest width of a head that variable-length kernels take, and what a width must be a multiple of."""
HARMLESS = frozenset(
    {
        *("position_ids", "use_cache", "return_dict"),
        *("output_attentions", "output_hidden_states", "output_router_logits"),
    }
)
"""What models hand to every attention function, and no plain one computes with."""
OF_ROWS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cu_seqlens", "seq_idx"})
"""Borders of rows, for kernels that take them; here the `RowMask` has them."""


class Unpackable(Exception):
    """A model does something that packed rows do not allow for. The text says what, after the model's name."""


class Pass:
    """One pass of a body over packed rows."""

    def __init__(self, segments: Segments, position_ids_1T: Tensor) -> None:
        self.segments = segments
        self.positions_T = position_ids_1T[0]
        """The position of each token in its row."""
        self.calls = 0
        """Calls of `attend` so far."""


_passes: list[Pass] = []
"""The current pass, as a stack: transformers' mask functions take no argument by which it could be handed over."""


@contextmanager
def over(segments: Segments, position_ids_1T: Tensor) -> Iterator[Pass]:
    """Within, a model with this attention computes packed rows that lie as `segments` says; positions are [1, T]."""
    made = Pass(segments, position_ids_1T)
    _passes.append(made)
    try:
        yield made
    finally:
        _passes.pop()


@dataclass(frozen=True, eq=False)
class RowMask:
    """What a model gets in place of a mask: layers may hand it to `attend`, and any other use raises Unpackable."""

    made: Pass
    reach: Reach

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # copy and pickle look for such names, and must find none
            raise AttributeError(name)
        raise Unpackable("reads the attention mask itself")

    @classmethod
    def __torch_function__(cls, *_: object, **__: object) -> NoReturn:
        raise Unpackable("computes with the attention mask itself")

    def __getitem__(self, places: Any) -> "RowMask":
        # Gemma 4 leaves out the queries whose logits nobody asked for; in training that is none of them.
        if isinstance(places, tuple) and all(part in (slice(None), slice(0, None)) for part in places):
            return self
        raise Unpackable("reads the attention mask itself")


MASKS = {
    "causal_mask_function": None,
    "and_masks.<locals>.and_mask": None,
    "packed_sequence_mask_function.<locals>.inner_mask": None,
    "remap_positions_for_packed_sequence.<locals>.inner_mask": None,
    "sliding_window_overlay.<locals>.inner_mask": "window",
    "chunked_overlay.<locals>.inner_mask": "chunk",
}
"""transformers' mask functions that packed rows allow for, by name, and the limit of `Reach` that they stand for."""


def _row_mask(*, mask_function: Any, local_size: int | None = None, **_: object) -> RowMask:
    """Return the mask of "segments". Raises Unpackable where the model wants one that is not built of known parts."""
    assert _passes, "packed attention outside of a pass over packed rows"
    limits: dict[str, int | None] = {}
    for part in _parts(mask_function):
        if part.__qualname__ not in MASKS:
            raise Unpackable(f"masks attention by {part.__qualname__.split('.')[0]}")
        if (limit := MASKS[part.__qualname__]) is not None:
            limits[limit] = local_size
    return RowMask(_passes[-1], Reach(**limits))


def _parts(function: FunctionType) -> Iterator[FunctionType]:
    """Yield a mask function and those that it is composed of."""
    # transformers composes masks as closures: the parts are found in the cells, and told apart by their names.
    yield function
    for cell in function.__closure__ or ():
        held = cell.cell_contents
        for inner in held if isinstance(held, tuple) else (held,):
            if isinstance(inner, FunctionType):
                yield from _parts(inner)


@dataclass(frozen=True)
class _Extras:
    """Additions of some families to attention scores [pieces, heads, Tq, Tk], before or in the softmax."""

    softcap: float | None
    """Scores are capped smoothly at ± this (Gemma 2)."""
    sinks_H: Tensor | None
    """A score for each head that takes its share of the softmax and stands for no key (gpt-oss)."""
    bias_HTT: Tensor | None
    """Added to scores, by token index of query and key."""

    def __bool__(self) -> bool:
        return any(extra is not None for extra in (self.softcap, self.sinks_H, self.bias_HTT))


def _scaled_by_row(module: Any, query: Tensor, made: Pass) -> Tensor:
    """Return [1, heads, T, width] as scaled by each token's position in its row.

    Layers of Llama 4 without rotary embeddings have scaled queries by their place in the line (arXiv 2501.19399).
    """
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query

    def scale(positions_T: Tensor) -> Tensor:
        return torch.log1p(torch.floor((positions_T.float() + 1) / module.floor_scale)) * module.attn_scale + 1

    places_T = torch.arange(query.shape[2], device=query.device)
    return (query * (scale(made.positions_T) / scale(places_T))[:, None]).to(query.dtype)


def attend(  # noqa: PLR0913 the signature that transformers' AttentionInterface calls
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,  # noqa: ARG001 the mask has it
    **others: object,
) -> tuple[Tensor, None]:
    """Attend to the own row and its prefix: [1, heads, T, width] each → [1, T, heads, width of values].

    Raises Unpackable for arguments that are set and not computed here.
    """
    if not isinstance(attention_mask, RowMask):
        raise Unpackable("does not hand its layers the mask that transformers made for it")
    segments = attention_mask.made.segments
    unknown = sorted(name for name, value in others.items() if value is not None and name not in HARMLESS | OF_ROWS)
    if unknown or is_causal is False:
        raise Unpackable(f"asks its attention for {', '.join(unknown) or 'keys that come later'}")
    if not query.shape[2] == key.shape[2] == segments.tokens:
        raise Unpackable("attends to keys that are not the tokens of its rows")
    if position_bias is not None and segments.has_prefixes:
        raise Unpackable("adds a bias to attention scores, which answers with a shared prompt do not allow for")
    attention_mask.made.calls += 1
    query = _scaled_by_row(module, query, attention_mask.made)
    reach = segments.within(attention_mask.reach)
    extras = _Extras(softcap, s_aux, None if position_bias is None else position_bias[0])
    if not extras and dropout == 0.0 and _has_kernel(query, value):
        return _varlen(query, key, value, segments, reach, scaling), None
    outputs = []
    q_THD, k_THD, v_THD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    laid = segments.blocks(reach)
    for block in laid.blocks:
        q = q_THD[block.queries].transpose(1, 2)
        k, v = (tensor[block.keys].transpose(1, 2) for tensor in (k_THD, v_THD))
        if extras:
            out = _in_full(q, k, v, block, extras, scaling, dropout)
        else:
            gqa, causal = q.shape[1] != k.shape[1], block.mask is None
            out = F.scaled_dot_product_attention(q, k, v, block.mask, dropout, causal, scale=scaling, enable_gqa=gqa)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    # Blocks hold tokens by length of their pieces, with padding; `scatter_T` finds each token in the order of the line.
    return torch.cat(outputs)[laid.scatter_T].unsqueeze(0), None


def _in_full(
    q: Tensor, k: Tensor, v: Tensor, block: Block, extras: _Extras, scaling: float | None, dropout: float
) -> Tensor:
    """Compute attention step by step, for scores that no kernel computes: [pieces, heads, T, width] → the same."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (tensor.repeat_interleave(repeats, 1) for tensor in (k, v)) if repeats > 1 else (k, v)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if extras.softcap is not None:
        scores = torch.tanh(scores / extras.softcap) * extras.softcap
    if extras.bias_HTT is not None:
        scores = scores + extras.bias_HTT[:, block.queries[:, :, None], block.keys[:, None, :]].transpose(0, 1)
    seen = block.mask
    if seen is None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if extras.sinks_H is not None:  # one more column of scores, which takes its share and is cut off below
        sinks = extras.sinks_H.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1).to(scores.dtype)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]]
    return F.dropout(weights, dropout) @ v


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    width = query.shape[-1]
    return query.is_cuda and is_half and width % UNIT == 0 and value.shape[-1] <= width <= WIDEST


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, reach: Reach, scaling: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds, width = segments.bounds(reach), value.shape[-1]
    value = F.pad(value, (0, query.shape[-1] - width))  # kernels want one width; the scale stays that of the queries
    q = query[0].transpose(0, 1).contiguous()
    k, v = (tensor[0].transpose(0, 1)[bounds.keys_K] for tensor in (key, value))
    out = varlen_attn(
        q,
        k,
        v,
        bounds.queries,
        bounds.keys,
        bounds.most_queries,
        bounds.most_keys,
        scale=scaling,
        window_size=(-1 if reach.window is None else reach.window - 1, 0),  # keys before the query's own
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[..., :width].unsqueeze(0)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _row_mask)
