"""PPO's pure functions against numbers worked by hand and against plain loops over single numbers."""

import math

import numpy as np
import pytest
import torch

from fttrain.objectives import ppo
from fttrain.objectives.ppo import Moments

MASK = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]])
    values = torch.tensor([[0.5, 1.0, 1.5], [1.0, 9.0, 9.0]])
    advantages, returns = ppo.gae(rewards, values, MASK, gamma=0.5, lam=0.5)
    # δ = 1 + 0.5·1 - 0.5 = 1, 0 + 0.5·1.5 - 1 = -0.25, 2 - 1.5 = 0.5; A = δ + 0.25·A'
    torch.testing.assert_close(advantages, torch.tensor([[0.96875, -0.125, 0.5], [2.0, 0.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.46875, 0.875, 2.0], [3.0, 0.0, 0.0]]))


def by_loop(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = Σ_k (γλ)^k δ_{t+k}, from the definition."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, after, strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (1.0, 1.0)])
def test_advantages_of_answers_of_any_length(gamma: float, lam: float):
    draw = torch.Generator().manual_seed(1)
    rewards, values = (torch.randn(5, 7, generator=draw) for _ in range(2))
    lengths = [1, 7, 3, 6, 2]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    advantages, returns = ppo.gae(rewards * mask, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(lengths):
        expected = by_loop(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam)
        np.testing.assert_allclose(advantages[row, :length], expected, atol=1e-5)
        assert not advantages[row, length:].any()
        assert not returns[row, length:].any()
        if gamma == lam == 1.0:  # the returns are what is still to come
            np.testing.assert_allclose(returns[row, 0], float(rewards[row, :length].sum()), atol=1e-5)


def test_the_score_is_given_at_the_last_token_and_kl_is_paid_at_each():
    kl = torch.tensor([[0.1, 0.2, 0.3], [0.4, 7.0, 7.0]])
    rewards = ppo.token_rewards(torch.tensor([2.0, -1.0]), kl, MASK, coefficient=0.5)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, -0.1, 1.85], [-1.2, 0.0, 0.0]]))


def test_kl_estimators():
    logps, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    torch.testing.assert_close(ppo.token_kl(logps, reference, estimator="k1"), torch.tensor([0.5, -1.0]))
    expected = [math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0]
    torch.testing.assert_close(ppo.token_kl(logps, reference, estimator="k3"), torch.tensor(expected))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_both_estimators_are_unbiased(estimator: str):
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    estimate = (p * ppo.token_kl(p.log(), q.log(), estimator=estimator)).sum()  # type: ignore[arg-type]
    torch.testing.assert_close(estimate, (p * (p / q).log()).sum())


def test_the_policy_loss_by_hand():
    # ratios 1.5, 0.5, 1.5, 0.5, 1.1 against a clip of 0.2
    old = torch.zeros(5)
    logps = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1]).log().requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    losses, clipped = ppo.policy_loss(logps, old, advantages, clip=0.2)
    torch.testing.assert_close(losses, torch.tensor([-1.2, -0.5, 1.5, 0.8, -2.2]))
    assert clipped.tolist() == [True, False, False, True, False]
    losses.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([0.0, -0.5, 1.5, 0.0, -2.2]))


def test_the_first_inner_step_has_ratio_1_and_nothing_clipped():
    logps, advantages = torch.randn(50), torch.randn(50)
    losses, clipped = ppo.policy_loss(logps, logps.clone(), advantages, clip=0.2)
    torch.testing.assert_close(losses, -advantages)
    assert not clipped.any()


def test_the_value_loss_by_hand():
    old, returns = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.1])
    values = torch.tensor([0.5, 0.1, -0.5]).requires_grad_()
    losses, clipped = ppo.value_loss(values, old, returns, clip=0.2)
    # (0.5-1)² < (0.2-1)²; (0.1-1)² within the clip; (-0.5-0.1)² > (-0.2-0.1)²
    torch.testing.assert_close(losses, torch.tensor([0.32, 0.405, 0.18]))
    assert clipped.tolist() == [True, False, False]
    losses.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, -0.9, -0.6]))


def test_losses_and_gradients_equal_a_loop_over_single_numbers():
    draw = np.random.default_rng(0)
    new, old, advantages, values, old_values, returns = draw.normal(size=(6, 40)) * 0.5

    def total(new: np.ndarray, values: np.ndarray) -> float:
        loss = 0.0
        for i in range(40):
            ratio = math.exp(new[i] - old[i])
            loss -= min(ratio * advantages[i], min(max(ratio, 0.8), 1.2) * advantages[i])
            held = min(max(values[i], old_values[i] - 0.3), old_values[i] + 0.3)
            loss += 0.1 * 0.5 * max((values[i] - returns[i]) ** 2, (held - returns[i]) ** 2)
        return loss

    tensors = [torch.tensor(array) for array in (new, old, advantages, values, old_values, returns)]
    logps, values_N = tensors[0].requires_grad_(), tensors[3].requires_grad_()
    loss = ppo.policy_loss(logps, tensors[1], tensors[2], clip=0.2).losses_N.sum()
    loss = loss + 0.1 * ppo.value_loss(values_N, tensors[4], tensors[5], clip=0.3).losses_N.sum()
    loss.backward()
    assert loss.item() == pytest.approx(total(new, values), abs=1e-9)
    for i in range(40):
        nudge = np.eye(40)[i] * 1e-6
        slope = (total(new + nudge, values) - total(new - nudge, values)) / 2e-6
        assert float(logps.grad[i]) == pytest.approx(slope, abs=1e-5)  # type: ignore[index]
        slope = (total(new, values + nudge) - total(new, values - nudge)) / 2e-6
        assert float(values_N.grad[i]) == pytest.approx(slope, abs=1e-5)  # type: ignore[index]


def test_whitening():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    deviation = math.sqrt((4 + 1 + 0 + 9) / 3)
    torch.testing.assert_close(ppo.whiten(values), (values - 3) / deviation)
    torch.testing.assert_close(ppo.whiten(values, shift_mean=False), (values - 3) / deviation + 3)
    assert ppo.whiten(torch.tensor([5.0])).tolist() == [0.0]


def test_entropy_and_its_gradient():
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, math.log(3.0), -1e9]], requires_grad=True)
    expected = [math.log(3), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))]
    found = ppo.entropy(logits)
    torch.testing.assert_close(found, torch.tensor(expected))
    found.sum().backward()  # dH/dz = -p (log p + H)
    slope = -0.25 * (math.log(0.25) + expected[1])
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0.0, 0.0], [slope, -slope, 0.0]]))


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert ppo.explained_variance(returns + 5, returns) == pytest.approx(1.0)
    assert ppo.explained_variance(torch.zeros(3), returns) == pytest.approx(0.0)
    assert ppo.explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert ppo.explained_variance(returns, torch.ones(3)) == 0.0


@pytest.mark.parametrize(
    ("kl", "expected"), [(6.0, 0.1), (6.6, 0.101), (60.0, 0.102), (0.0, 0.098), (5.4, 0.099)], ids=str
)
def test_the_kl_coefficient_follows_its_target(kl: float, expected: float):
    found = ppo.adapt_kl(0.1, kl, target=6.0, horizon=1000, answers=100)
    assert found == pytest.approx(expected)


def test_moments_do_not_depend_on_how_numbers_come():
    values = torch.tensor([1.0, -2.0, 4.0, 4.5, 0.0, 3.0])
    moments = Moments().with_more(values[:1]).with_more(values[1:4]).with_more(values[4:])
    assert moments.mean == pytest.approx(float(values.mean()))
    torch.testing.assert_close(moments.normalise(values), (values - values.mean()) / values.std())
    assert Moments().with_more(torch.ones(3)).normalise(torch.ones(3)).tolist() == [0.0, 0.0, 0.0]
