"""How long rows may be, and which tokens may be in them, for one model."""

import re
from typing import Any

from torch import nn

from fttrain.adapters.targets import body_of, token_table
from fttrain.data.limits import Limits

TABLE = re.compile("pos|wpe")
"""Names of tables of positions: wpe, embed_positions, position_embeddings, positions_embed, pos_encoding."""


def of(causal: Any) -> Limits:
    """Return the limits of a causal language model; rotary and relative positions have none."""
    config = causal.config.get_text_config()
    tokens = token_table(causal)
    # Inkling's head says nothing of the last tokens of its embedding.
    vocabulary = min(tokens.num_embeddings, getattr(config, "unpadded_vocab_size", None) or tokens.num_embeddings)
    _, body = body_of(causal)  # towers of images and sound have positions of their own
    tables = [_rows(part) for name, part in body.named_modules() if TABLE.search(name) and _is_table(part, tokens)]
    tables += [
        len(buffer)
        for name, buffer in body.named_buffers()
        if TABLE.search(name.rpartition(".")[2]) and buffer.dim() > 1 and buffer.is_floating_point()
    ]
    if hasattr(causal.base_model, "build_mpt_alibi_tensor"):  # relative, but made for so many tokens
        tables.append(config.max_seq_len)
    if not tables:
        return Limits(vocabulary, None)
    # Tables of OPT's kind have two more rows than positions, which only the config tells.
    return Limits(vocabulary, min(*tables, getattr(config, "max_position_embeddings", None) or tables[0]))


def _is_table(part: nn.Module, tokens: nn.Module) -> bool:
    return isinstance(part, nn.Embedding) and part is not tokens


def _rows(table: Any) -> int:
    """Return how many positions a table has; RoBERTa's kind counts from the row after that of padding."""
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
