"""What each kind of noise draws, by its moments over 10⁶ samples, its masks and its generator; all from torch alone."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ftlaunch.recipe.noise import (
    AlphaDropout,
    Dropout,
    DropPath,
    Gaussian,
    GaussianDropout,
    LockedDropout,
    Multiplicative,
    Noise,
    Poisson,
    Saturated,
    Uniform,
)
from fttrain.checkpoint import random_states
from fttrain.noise.activation_functions import BY_NAME, NoisyWhereSaturated
from fttrain.noise.hooks import SampledNoise, strength
from fttrain.noise.kinds import add_noise
from fttrain.noise.row_index import Places

SAMPLES = 1_000_000
P = 0.2


def rows(*lengths: int) -> Places:
    """Rows laid end to end in one line."""
    places = Places()
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    places.take(torch.cat([torch.full((length,), length) for length in lengths])[None], positions)
    return places


@pytest.mark.parametrize(
    ("noise", "mean", "variance"),
    [
        (Gaussian(mean=0.3, std=0.2), 0.3, 0.04),
        (Uniform(mean=-0.1, std=0.2), -0.1, 0.04),
        (Gaussian(mean=0.3, std=0.2, relative=True), 0.9, 0.36),
        (Uniform(std=0.2, relative=True), 0.0, 0.36),
        (Multiplicative(mean=1.0, std=0.2), 0.0, 9 * 0.04),
        (Multiplicative(mean=0.5, std=0.2), -1.5, 9 * 0.04),
        (Poisson(rate=2.0, scale=0.5), 0.0, 0.5),
        (Dropout(probability=P), 0.0, 9 * P / (1 - P)),
        (GaussianDropout(probability=P), 0.0, 9 * P / (1 - P)),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "sites") else "",
)
def test_the_mean_and_variance_of_what_is_added(noise: Noise, mean: float, variance: float):
    torch.manual_seed(3)
    a = torch.full((1000, SAMPLES // 1000), -3.0 if isinstance(noise, Dropout | GaussianDropout) else 3.0)
    added = add_noise(a, noise, 1.0, Places()) - a
    error = math.sqrt(variance / SAMPLES)
    assert float(added.mean()) == pytest.approx(mean, abs=5 * error)
    assert float(added.var()) == pytest.approx(variance, rel=0.02)
    assert not added.requires_grad


def test_uniform_noise_keeps_within_its_bounds():
    a = torch.zeros(SAMPLES)
    assert float(add_noise(a, Uniform(std=0.2), 1.0, Places()).abs().max()) <= 0.2 * math.sqrt(3)


def test_alpha_dropout_is_torchs_own_and_keeps_selu_s_moments():
    torch.manual_seed(5)
    a = torch.randn(SAMPLES)
    torch.manual_seed(6)
    y = add_noise(a, AlphaDropout(probability=P), 1.0, Places())
    torch.manual_seed(6)
    assert torch.equal(y, torch.nn.AlphaDropout(P).train()(a))
    assert float(y.mean()) == pytest.approx(0, abs=0.01)
    assert float(y.var()) == pytest.approx(1, abs=0.02)


def test_masks_of_rows_are_one_for_all_tokens_of_a_row():
    places = rows(3, 1, 4)
    torch.manual_seed(7)
    y = add_noise(torch.ones(1, 8, 400), LockedDropout(probability=0.5), 1.0, places)[0]
    assert set(y.unique().tolist()) == {0.0, 2.0}
    of_rows = [y[:3], y[3:4], y[4:]]
    assert all((row == row[:1]).all() for row in of_rows)
    assert not torch.equal(of_rows[0][0], of_rows[1][0])
    kept = torch.stack(
        [add_noise(torch.ones(1, 8, 2), DropPath(probability=0.25), 1.0, places)[0] for _ in range(4000)]
    )
    assert kept.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert (kept[:, :3] == kept[:, :1, :1]).all()
    assert float(kept[:, 4].mean()) == pytest.approx(1, abs=0.03)


def test_annealing_runs_from_all_of_the_noise_to_none():
    assert [strength("linear", done) for done in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    assert [strength("cosine", done) for done in (0.0, 0.5, 1.0)] == [1.0, pytest.approx(0.5), 0.0]
    assert strength("constant", 0.9) == 1.0
    a = torch.randn(100, 100)
    noises = [Gaussian(mean=1.0), Uniform(), Multiplicative(mean=0.5), Poisson(), Dropout(), GaussianDropout()]
    for noise in noises:
        torch.testing.assert_close(add_noise(a, noise, 0.0, Places()), a)
    torch.manual_seed(1)
    half = add_noise(torch.zeros(SAMPLES), Gaussian(std=1.0), 0.5, Places())
    assert float(half.std()) == pytest.approx(0.5, rel=0.01)


@pytest.fixture
def noisy() -> torch.nn.Module:
    module = torch.nn.SiLU()
    SampledNoise(Gaussian(std=0.5), [module], Places())
    return module


def test_it_is_awake_in_training_only_and_drawn_from_torch_s_seed(noisy: torch.nn.Module):
    x = torch.randn(4, 8)
    assert torch.equal(noisy.eval()(x), torch.nn.functional.silu(x))
    noisy.train()
    torch.manual_seed(1)
    first, second = noisy(x), noisy(x)
    torch.manual_seed(1)
    assert torch.equal(noisy(x), first)
    assert not torch.equal(first, second)


def test_recomputation_draws_the_same_noise_again(noisy: torch.nn.Module):
    noisy.train()
    seen: list[torch.Tensor] = []
    noisy.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    x = torch.randn(4, 8, requires_grad=True)
    checkpoint(torch.nn.Sequential(noisy, torch.nn.Linear(8, 2)), x, use_reentrant=False).square().sum().backward()
    assert len(seen) == 2
    assert torch.equal(*seen)


def by_hand(x: float, noise: Saturated, xi: float) -> float:
    """Gulcehre et al. 2016, in words of one number."""
    if noise.activation == "hard_tanh":
        hard, linear = max(-1.0, min(1.0, x)), x
    else:
        hard, linear = max(0.0, min(1.0, 0.25 * x + 0.5)), 0.25 * x + 0.5
    gate = 1 / (1 + math.exp(-noise.sharpness * (hard - linear))) - 0.5
    direction = -math.copysign(1, x) * math.copysign(1, 1 - noise.alpha)
    return noise.alpha * hard + (1 - noise.alpha) * linear + direction * noise.std * gate * gate * xi


@pytest.mark.parametrize("activation", ["hard_tanh", "hard_sigmoid"])
@pytest.mark.parametrize("alpha", [0.9, 1.15])
def test_saturated_noise_is_gulcehre_s(activation: str, alpha: float):
    noise = Saturated(activation=activation, alpha=alpha, std=0.5, sharpness=2.0)  # type: ignore[arg-type]
    module = NoisyWhereSaturated(noise)
    x = torch.linspace(-4, 4, 33)
    expected = [by_hand(float(value), noise, 0.7978846) for value in x]
    torch.testing.assert_close(module.eval()(x), torch.tensor(expected))
    module.train()
    torch.manual_seed(2)
    y = module(x)
    torch.manual_seed(2)
    expected = [by_hand(float(v), noise, float(one)) for v, one in zip(x, torch.randn(33).abs(), strict=True)]
    torch.testing.assert_close(y, torch.tensor(expected))
    inside = x.abs() < (1 if activation == "hard_tanh" else 2)
    torch.testing.assert_close(y[inside], BY_NAME[activation]()(x[inside]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("golu", 1.5 * math.exp(-math.exp(-1.5))),
        ("silu", 1.5 / (1 + math.exp(-1.5))),
        ("gelu", 0.75 * (1 + math.erf(1.5 / math.sqrt(2)))),
        ("gelu_tanh", 0.75 * (1 + math.tanh(math.sqrt(2 / math.pi) * (1.5 + 0.044715 * 1.5**3)))),
        ("mish", 1.5 * math.tanh(math.log1p(math.exp(1.5)))),
        ("softplus", math.log1p(math.exp(1.5))),
        ("hard_sigmoid", 0.875),
    ],
)
def test_activation_functions_by_name(name: str, value: float):
    assert float(BY_NAME[name]()(torch.tensor(1.5))) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(("name", "slope"), [("leaky_relu", 0.01), ("prelu", 0.25), ("relu", 0.0)])
def test_slopes_below_zero(name: str, slope: float):
    assert float(BY_NAME[name]()(torch.tensor(-2.0))) == pytest.approx(-2 * slope)


def test_ranks_of_one_step_draw_different_noise():
    drawn = []
    for rank in (0, 1, 0):
        random_states.begin(7, 0, rank)
        drawn.append(add_noise(torch.zeros(100), Gaussian(std=1.0), 1.0, Places()))
    assert torch.equal(drawn[0], drawn[2])
    assert abs(float(torch.corrcoef(torch.stack(drawn[:2]))[0, 1])) < 0.4
