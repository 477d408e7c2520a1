"""Losses of pairs of answers: pure functions of rewards and log-probabilities; each returns one loss per pair, [G].

`chosen` is the better and `rejected` the worse answer. `logps` are sums over an answer's tokens of log-probabilities,
`mean_logps` their averages.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(rewards_G2: Tensor, margins_G: Tensor, *, margin: float, centering: float) -> Tensor:
    """-log σ(r_chosen - r_rejected - m) + c·(r_chosen + r_rejected)², m = `margin` times the pair's own.

    Ouyang et al. 2022 (arXiv 2203.02155, eq. 1); margin: Touvron et al. 2023 (2307.09288, eq. 2); centring: Eisenstein
    et al. 2023 (2312.09244).
    """
    chosen_G, rejected_G = rewards_G2.unbind(-1)
    losses_G = -F.logsigmoid(chosen_G - rejected_G - margin * margins_G)
    return losses_G + centering * (chosen_G + rejected_G).square() if centering else losses_G


def dpo(ratios_G2: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log σ(β·h), h being how much the log-ratio policy / reference of the chosen answer exceeds the other's.

    Rafailov et al. 2023 (arXiv 2305.18290, eq. 7). With label smoothing ε the loss of the swapped pair counts by ε:
    conservative DPO (Mitchell 2023, ericmitchell.ai/cdpo.pdf).
    """
    h_G = beta * _difference(ratios_G2)
    return -(1 - label_smoothing) * F.logsigmoid(h_G) - label_smoothing * F.logsigmoid(-h_G)


def robust_dpo(ratios_G2: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO's loss without the bias that labels wrong at the rate `label_smoothing` give it.

    Chowdhury et al. 2024 (arXiv 2403.00409, eq. 12).
    """
    h_G = beta * _difference(ratios_G2)
    swapped_G = -label_smoothing * F.logsigmoid(-h_G)
    return (-(1 - label_smoothing) * F.logsigmoid(h_G) - swapped_G) / (1 - 2 * label_smoothing)


def ipo(mean_ratios_G2: Tensor, *, beta: float) -> Tensor:
    """(h - 1 / (2β))², with h of log-ratios averaged over tokens, as its authors apply it.

    Azar et al. 2023 (arXiv 2310.12036, eq. 17; β is the paper's τ).
    """
    return (_difference(mean_ratios_G2) - 1 / (2 * beta)).square()


def hinge(ratios_G2: Tensor, *, beta: float) -> Tensor:
    """max(0, 1 - β·h): SLiC's calibration loss on DPO's log-ratios (Zhao et al. 2023, arXiv 2305.10425)."""
    return torch.relu(1 - beta * _difference(ratios_G2))


def orpo(mean_logps_G2: Tensor, *, beta: float) -> Tensor:
    """Cross-entropy of the chosen answer per token, and β times -log σ of the log odds ratio of the two answers.

    Hong et al. 2024 (arXiv 2403.07691, eq. 6; β is the paper's λ). odds = P / (1 - P), P the geometric mean of the
    tokens' probabilities.
    """
    log_odds_G = _difference(mean_logps_G2) - _difference(log1mexp(mean_logps_G2))
    return -mean_logps_G2[:, 0] - beta * F.logsigmoid(log_odds_G)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, accurate near 0 and far from it (Mächler 2012); x from -1e-6 up counts as -1e-6.

    `x` is of any shape.
    """
    x = x.clamp(max=-1e-6)
    near = x > -math.log(2)
    # Each branch is kept from the values that would make its gradient infinite where the other one counts.
    inner = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    outer = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, inner, outer)


def calibration_error(differences_G: Tensor, bins: int = 10) -> float:
    """Expected calibration error of σ(|difference|), the model's confidence in its own choice, in equal bins of ½ … 1.

    Guo et al. 2017 (arXiv 1706.04599): mean distance of accuracy from confidence, weighted by a bin's share.
    """
    confidences, right = differences_G.abs().sigmoid(), (differences_G > 0).float()
    # A confidence in one's own choice is at least ½, so bins divide the upper half; the last one has 1 in it.
    numbers = ((confidences - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins).index_add_(0, numbers, right - confidences)
    return float(gaps.abs().sum() / len(differences_G))


def _difference(values_G2: Tensor) -> Tensor:
    chosen_G, rejected_G = values_G2.unbind(-1)
    return chosen_G - rejected_G
