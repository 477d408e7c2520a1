"""Log-probabilities of chosen tokens, in chunks: the full [T, V] logits never exist."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fttrain.objectives.ppo import entropy

CHUNK = 1024
"""Tokens whose logits exist at once."""
ROWS = 128
"""Tokens whose logits exist at once in fp32 too, where the head is frozen."""

Head = Callable[[Tensor], Tensor]
"""[N, D] → logits [N, V]."""


class Scores(NamedTuple):
    """Log-probability, entropy and correctness of each chosen token."""

    smoothed_N: Tensor
    """(1 - s)·log p(target) + s·mean over the vocabulary of log p; carries the gradient. s: label smoothing."""
    logps_N: Tensor
    """log p(target), without gradient."""
    correct_N: Tensor
    """Whether the target is the most probable token."""
    entropy_N: Tensor
    """Entropy of the distribution in nats; carries the gradient. Empty unless it was asked for."""
    router_loss: Tensor | None = None
    """The loss that balances experts, times its weight; carries the gradient. None unless it was asked for."""


def num_chunks(tokens: int) -> int:
    """Return how many calls of the head `tokens` chosen tokens need."""
    return max(1, -(-tokens // CHUNK))


def score(
    hidden_ND: Tensor,
    targets_N: Tensor,
    head: Head,
    *,
    trained_head: bool,
    chunks: int = 1,
    smoothing: float = 0.0,
    with_entropy: bool = False,
) -> Scores:
    """Return the scores of `targets_N` under `head(hidden_ND)`, in at least `chunks` calls, the last ones empty.

    Under ZeRO-3 a call gathers the head's weights from all ranks, so all ranks must make the same number of calls.
    A frozen head's gradient towards the hidden states is made together with the loss, chunk by chunk: two matrix
    products where recomputation would take three. A trained head (its own weights or an adapter on it) is recomputed,
    and so are scores with their entropy.
    """
    chunks = max(chunks, num_chunks(targets_N.shape[0]))
    if with_entropy or (trained_head and torch.is_grad_enabled()):
        chunk = partial(_score_chunk, head, smoothing=smoothing, with_entropy=with_entropy)
        parts = [checkpoint(chunk, hidden_ND[here], targets_N[here], use_reentrant=False) for here in slices(chunks)]
        return Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))
    smoothed_N, logps_N, correct_N = _FrozenHead.apply(hidden_ND, targets_N, head, smoothing, chunks)
    return Scores(smoothed_N, logps_N, correct_N, logps_N.new_empty(0))


def slices(chunks: int) -> list[slice]:
    """Return the slice of N tokens that each chunk covers; those beyond N are empty."""
    return [slice(index * CHUNK, (index + 1) * CHUNK) for index in range(chunks)]


def _score_chunk(
    head: Head, hidden_ND: Tensor, targets_N: Tensor, *, smoothing: float, with_entropy: bool
) -> tuple[Tensor, ...]:
    """Return the columns of Scores for one chunk, differentiable by autograd."""
    logits_NV = head(hidden_ND).float()
    entropy_N = entropy(logits_NV) if with_entropy else logits_NV.new_empty(0)
    return *_from_logits(logits_NV, targets_N, smoothing)[:3], entropy_N


def _from_logits(logits_NV: Tensor, targets_N: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse_N = logits_NV.logsumexp(-1)
    logps_N = logits_NV.gather(-1, targets_N[:, None])[:, 0] - lse_N
    smoothed_N = logps_N
    if smoothing:  # the mean over the vocabulary of log p is mean(logits) - lse: no log-softmax is stored
        smoothed_N = (1 - smoothing) * logps_N + smoothing * (logits_NV.mean(-1) - lse_N)
    return smoothed_N, logps_N.detach(), logits_NV.detach().argmax(-1) == targets_N, lse_N


class _FrozenHead(torch.autograd.Function):
    """`_score_chunk` over all chunks, without entropy, with d smoothed / d hidden kept from the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, targets_N: Tensor, head: Head, smoothing: float, chunks: int
    ) -> tuple[Tensor, ...]:
        wanted = ctx.needs_input_grad[0]
        grad_ND = torch.empty_like(hidden_ND) if wanted else None
        parts: list[tuple[Tensor, ...]] = []
        for here in slices(chunks):
            part, gradient = _score_and_grad(head, hidden_ND[here], targets_N[here], smoothing, wanted=wanted)
            parts.append(part)
            if grad_ND is not None and gradient is not None:
                grad_ND[here] = gradient
        ctx.grad_ND = grad_ND
        outputs = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        if ctx.grad_ND is None:
            return None, None, None, None, None
        # The loss weights each token's score by grads[0]; scores are independent, so the gradient scales row by row.
        return ctx.grad_ND * grads[0][:, None].to(ctx.grad_ND.dtype), None, None, None, None


def _score_and_grad(
    head: Head, hidden_ND: Tensor, targets_N: Tensor, smoothing: float, *, wanted: bool
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Return the scores of one chunk and, if wanted, their gradient by row: (target - p)·W."""
    # Only the head's matrix product is recorded by autograd. The gradient towards the logits is written over the
    # logits themselves, so no second [N, V] exists, and then goes through the head.
    with torch.set_grad_enabled(wanted):
        hidden_ND = hidden_ND.detach().requires_grad_(wanted)
        raw_NV = head(hidden_ND)
    held_NV = raw_NV.detach()
    pairs = zip(held_NV.split(ROWS), targets_N.split(ROWS), strict=True)
    parts = [_score_rows(held, targets, smoothing, wanted=wanted) for held, targets in pairs]
    scores = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    if not wanted:
        return scores, None
    (gradient,) = torch.autograd.grad(raw_NV, hidden_ND, held_NV)
    return scores, gradient


def _score_rows(raw_NV: Tensor, targets_N: Tensor, smoothing: float, *, wanted: bool) -> tuple[Tensor, ...]:
    """Return the scores of some rows; if wanted, overwrite the logits with the gradient towards them."""
    logits_NV = raw_NV.float()
    *scores, lse_N = _from_logits(logits_NV, targets_N, smoothing)
    if wanted:
        grad_NV = (logits_NV - lse_N[:, None]).exp_().neg_()  # -p; the smoothed target is added to it
        if smoothing:
            grad_NV += smoothing / grad_NV.shape[-1]
        grad_NV.scatter_add_(1, targets_N[:, None], torch.full_like(lse_N, 1 - smoothing)[:, None])
        raw_NV.copy_(grad_NV)
    return tuple(scores)
