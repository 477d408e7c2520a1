"""Losses of pairs against numbers worked by hand; test_trl compares them with TRL's."""

import math

import pytest
import torch

from fttrain.objectives import preference


def two(*rows: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_bradley_terry_by_hand() -> None:
    rewards = two((1.0, -0.5), (0.2, 0.9))
    plain = preference.bradley_terry(rewards, torch.ones(2), margin=0.0, centering=0.0)
    assert plain.tolist() == pytest.approx([-log_sigmoid(1.5), -log_sigmoid(-0.7)])
    losses = preference.bradley_terry(rewards, torch.tensor([2.0, 1.0]), margin=0.5, centering=0.01)
    assert losses.tolist() == pytest.approx([-log_sigmoid(0.5) + 0.01 * 0.25, -log_sigmoid(-1.2) + 0.01 * 1.21])


def test_dpo_starts_at_ln_2_and_pulls_the_answers_apart() -> None:
    ratios = two((0.0, 0.0))
    loss = preference.dpo(ratios, beta=0.1).sum()
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert ratios.grad is not None
    assert ratios.grad.tolist() == [pytest.approx([-0.05, 0.05])]


def test_dpo_s_variants_by_hand() -> None:
    ratios, h = two((3.0, -2.0), (-1.0, 1.5)), (0.5, -0.25)
    assert preference.dpo(ratios, beta=0.1).tolist() == pytest.approx([-log_sigmoid(x) for x in h])
    smoothed = [-0.9 * log_sigmoid(x) - 0.1 * log_sigmoid(-x) for x in h]
    assert preference.dpo(ratios, beta=0.1, label_smoothing=0.1).tolist() == pytest.approx(smoothed)
    robust = [(-0.9 * log_sigmoid(x) + 0.1 * log_sigmoid(-x)) / 0.8 for x in h]
    assert preference.robust_dpo(ratios, beta=0.1, label_smoothing=0.1).tolist() == pytest.approx(robust)
    assert preference.ipo(ratios, beta=0.1).tolist() == pytest.approx([0.0, 7.5**2])
    assert preference.hinge(ratios, beta=0.1).tolist() == pytest.approx([0.5, 1.25])


def test_orpo_by_hand() -> None:
    chosen, rejected = math.log(0.8), math.log(0.4)
    expected = -chosen - 0.5 * log_sigmoid(math.log((0.8 / 0.2) / (0.4 / 0.6)))
    assert preference.orpo(two((chosen, rejected)), beta=0.5).tolist() == pytest.approx([expected])


def test_log1mexp_is_accurate_in_value_and_gradient_at_both_ends() -> None:
    x = torch.tensor([-1e-5, -1e-3, -0.6, -0.8, -20.0, -50.0], requires_grad=True)
    y = preference.log1mexp(x)
    y.sum().backward()
    assert x.grad is not None
    for value, got, slope in zip(x.tolist(), y.tolist(), x.grad.tolist(), strict=True):
        assert got == pytest.approx(math.log(-math.expm1(value)) if value > -30 else -math.exp(value), rel=1e-5)
        assert slope == pytest.approx(1 / math.expm1(-value) * -1, rel=1e-4)
    certain = torch.zeros(1, requires_grad=True)
    assert preference.log1mexp(certain).isfinite().all()


def test_calibration_error_by_hand() -> None:
    sure = math.log(0.95 / 0.05)  # confidence 0.95
    assert preference.calibration_error(torch.tensor([sure] * 19 + [-sure])) == pytest.approx(0.0, abs=1e-6)
    assert preference.calibration_error(torch.tensor([-sure] * 4)) == pytest.approx(0.95)
    unsure = math.log(0.6 / 0.4)
    half = torch.tensor([unsure, -unsure, sure, sure])
    assert preference.calibration_error(half) == pytest.approx(0.5 * 0.1 + 0.5 * 0.05, abs=1e-6)
