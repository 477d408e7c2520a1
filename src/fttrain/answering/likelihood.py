"""Log-likelihoods of given tokens under a model, in batches, summed over chosen tokens of each row."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

TOKENS_SIDE_BY_SIDE = 2048
"""Tokens of a batch at most, padding included: logits of all of them are in memory."""


class Row(NamedTuple):
    """Tokens, and which of them are scored; the first token of a row has no likelihood and is never counted."""

    ids_T: np.ndarray
    asked_T: np.ndarray


class Likelihood(NamedTuple):
    """Log-likelihood of a row's scored tokens."""

    logp: float
    """Sum over the tokens, in nats."""
    tokens: int


def likelihoods(model: Any, rows: Sequence[Row]) -> Iterator[dict[int, Likelihood]]:
    """The likelihood of each row by its place, a batch at a time, long ones first."""
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place].ids_T))
    start = 0
    while start < len(order):
        width = len(rows[order[start]].ids_T)
        places = order[start : start + max(1, TOKENS_SIDE_BY_SIDE // width)]
        yield dict(zip(places, _of_batch(model, [rows[place] for place in places]), strict=True))
        start += len(places)


@torch.no_grad()
def _of_batch(model: Any, rows: list[Row]) -> list[Likelihood]:
    width = max(len(row.ids_T) for row in rows)
    ids, mask, asked = (np.zeros((len(rows), width), dtype=np.int64) for _ in range(3))
    for line, row in enumerate(rows):
        length = len(row.ids_T)
        ids[line, :length], mask[line, :length], asked[line, :length] = row.ids_T, 1, row.asked_T
    ids_BT, mask_BT = (torch.from_numpy(array).to(model.device) for array in (ids, mask))
    # Virtual tokens, where an adapter has them, have logits of their own, before the row's.
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, -width:][:, :-1]
    asked_BT = torch.from_numpy(asked[:, 1:].astype(bool)).to(model.device)
    logps_N = logits_BTV[asked_BT].float().log_softmax(-1).gather(1, ids_BT[:, 1:][asked_BT][:, None])[:, 0]
    sums_B = logps_N.new_zeros(len(rows), dtype=torch.float64)
    sums_B = sums_B.index_add(0, asked_BT.nonzero()[:, 0], logps_N.double())
    counts = asked[:, 1:].sum(1).tolist()
    return [Likelihood(logp, tokens) for logp, tokens in zip(sums_B.tolist(), counts, strict=True)]
