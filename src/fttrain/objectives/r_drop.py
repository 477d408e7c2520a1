"""R-Drop: two passes with different dropout and noise, trained to give the same distribution."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fttrain.objectives.logps import Head, num_chunks, slices


class RDropScores(NamedTuple):
    """Loss and divergence of two passes at each chosen token."""

    losses_N: Tensor
    """Mean of both cross-entropies, and weight / 2 times both divergences; carries the gradient."""
    divergence_N: Tensor
    """KL(first, second) + KL(second, first) in nats, without gradient."""


def r_drop(
    hidden_2ND: tuple[Tensor, Tensor], targets_N: Tensor, head: Head, *, weight: float, smoothing: float, chunks: int
) -> RDropScores:
    """Return R-Drop's loss of `targets_N` (Liang et al. 2021, arXiv 2106.14448, eq. 4, halved), chunk by chunk.

    As in `logps.score` the head is called in at least `chunks` chunks. Logits are computed again for the gradient.
    """
    chunk = partial(_chunk, head, weight=weight, smoothing=smoothing)
    one, two = hidden_2ND
    parts = [
        checkpoint(chunk, one[here], two[here], targets_N[here], use_reentrant=False)
        for here in slices(max(chunks, num_chunks(targets_N.shape[0])))
    ]
    return RDropScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _chunk(
    head: Head, one_ND: Tensor, two_ND: Tensor, targets_N: Tensor, *, weight: float, smoothing: float
) -> tuple[Tensor, Tensor]:
    first_NV, second_NV = (head(hidden_ND).float().log_softmax(-1) for hidden_ND in (one_ND, two_ND))
    nll_N = sum(
        F.cross_entropy(logp_NV, targets_N, reduction="none", label_smoothing=smoothing)
        for logp_NV in (first_NV, second_NV)
    )
    # KL(p, q) + KL(q, p) = Σ (p - q)·(log p - log q): one sum over the vocabulary instead of two.
    divergence_N = ((first_NV.exp() - second_NV.exp()) * (first_NV - second_NV)).sum(-1)
    return nll_N / 2 + weight / 2 * divergence_N, divergence_N.detach()
