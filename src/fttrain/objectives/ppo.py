"""PPO for language models (arXiv 1707.06347, 1909.08593, 2009.01325). B answers, T their tokens, N all real tokens.

`mask_BT` is true on the tokens of an answer, which begin at 0 and have no gaps; what lies after them counts nowhere.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

KL_STEP = 0.2
"""Largest relative error that the adaptive coefficient answers to (arXiv 1909.08593, section 2.2)."""


class ClippedLoss(NamedTuple):
    """A clipped loss, token by token."""

    losses_N: Tensor
    clipped_N: Tensor
    """Whether the clipped term is the larger one, so that the token has no gradient."""


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of all numbers seen so far."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def with_more(self, values: Tensor) -> "Moments":
        """Return the moments of the numbers so far and these, of any shape (Chan et al. 1979, parallel variance)."""
        more, mean = values.numel(), float(values.double().mean())
        count, shift = self.count + more, mean - self.mean
        squares = self.squares + float((values.double() - mean).square().sum())
        return Moments(count, self.mean + shift * more / count, squares + shift**2 * self.count * more / count)

    def normalise(self, values: Tensor) -> Tensor:
        """Return values of any shape less the mean, divided by the standard deviation, or by 1 while that is 0."""
        deviation = (self.squares / max(1.0, self.count - 1)) ** 0.5
        return (values - self.mean) / (deviation or 1.0)


def token_kl(logps: Tensor, reference_logps: Tensor, *, estimator: Literal["k1", "k3"]) -> Tensor:
    """Return KL(policy ‖ reference) at each sampled token, in nats (Schulman 2020, "Approximating KL divergence").

    "k1" is log p - log q: unbiased, of either sign. "k3" is q/p - 1 - log q/p: unbiased too, never negative.
    """
    log_ratio = reference_logps - logps
    return -log_ratio if estimator == "k1" else log_ratio.expm1() - log_ratio


def token_rewards(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, *, coefficient: float) -> Tensor:
    """Return [B, T]: -coefficient · KL at each token, and the answer's score added at its last one; 0 after it."""
    last_B1 = mask_BT.sum(1, keepdim=True) - 1
    return (-coefficient * kl_BT * mask_BT).scatter_add(1, last_B1, scores_B[:, None].to(kl_BT.dtype))


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, [B, T] each, 0 after the answers (arXiv 1506.02438, eq. 16).

    δ_t = r_t + γ·V_{t+1} - V_t and A_t = δ_t + γλ·A_{t+1}, with V = A = 0 after the last token; R = A + V.
    """
    values_BT = values_BT * mask_BT
    advantages_BT = torch.zeros_like(values_BT)
    next_advantage_B, next_value_B = torch.zeros_like(values_BT[:, 0]), torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        # The mask zeroes what is computed on padding, so an answer's last token sees V = A = 0 as the next.
        next_advantage_B = (delta_B + gamma * lam * next_advantage_B) * mask_BT[:, t]
        advantages_BT[:, t], next_value_B = next_advantage_B, values_BT[:, t]
    return advantages_BT, advantages_BT + values_BT


def whiten(values_N: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Return values divided by their standard deviation and, with `shift_mean`, moved to mean 0; one stays finite."""
    mean = values_N.mean()
    variance = values_N.var(correction=1) if values_N.numel() > 1 else torch.zeros_like(mean)
    whitened_N = (values_N - mean) * (variance + 1e-8).rsqrt()
    return whitened_N if shift_mean else whitened_N + mean


def policy_loss(logps_N: Tensor, old_logps_N: Tensor, advantages_N: Tensor, *, clip: float) -> ClippedLoss:
    """Return -min(ρA, clip(ρ, 1 - clip, 1 + clip)·A) with ρ = p_new / p_old (arXiv 1707.06347, eq. 7)."""
    ratio_N = (logps_N - old_logps_N).exp()
    free_N, held_N = -ratio_N * advantages_N, -ratio_N.clamp(1 - clip, 1 + clip) * advantages_N
    return ClippedLoss(torch.maximum(free_N, held_N), held_N.detach() > free_N.detach())


def value_loss(values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, *, clip: float) -> ClippedLoss:
    """Return ½·max((V - R)², (clip(V, V_old ± clip) - R)²)."""
    held_N = torch.clamp(values_N, old_values_N - clip, old_values_N + clip)
    free_N, held_N = (values_N - returns_N).square(), (held_N - returns_N).square()
    return ClippedLoss(0.5 * torch.maximum(free_N, held_N), held_N.detach() > free_N.detach())


def entropy(logits_NV: Tensor) -> Tensor:
    """Return [N]: the entropy of softmax(logits) in nats."""
    return logits_NV.logsumexp(-1) - (logits_NV.softmax(-1) * logits_NV).sum(-1)


def explained_variance(values_N: Tensor, returns_N: Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 where values foresee returns, 0 where they say nothing; 0 where returns are alike."""
    variance = float(returns_N.double().var(correction=0))
    return 1.0 - float((returns_N - values_N).double().var(correction=0)) / variance if variance > 0 else 0.0


def adapt_kl(coefficient: float, kl: float, *, target: float, horizon: float, answers: int) -> float:
    """The KL coefficient after a batch of answers of mean KL `kl`, nats per answer (arXiv 1909.08593, section 2.2)."""
    error = min(max(kl / target - 1.0, -KL_STEP), KL_STEP)
    return coefficient * (1.0 + error * answers / horizon)
