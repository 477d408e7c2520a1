"""Grids, calibrators, ternary weights and stored integers against worked numbers, numpy, torch and bitsandbytes."""

from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from torch.ao.quantization.observer import MinMaxObserver, MovingAverageMinMaxObserver, PerChannelMinMaxObserver

from ftlaunch.errors import UserError
from ftlaunch.tools import Granularity, WeightFormat
from fttrain.quant import activations, calibrate, grid, packing, weights
from fttrain.quant.grid import Grid
from fttrain.quant.ternary import absmean, ternary
from fttrain.quant.weights import DOUBLE_QUANTIZATION, Scheme, quantized, round_trip, through_blocks_of_64

X = [149.35, -50.37, 0, 22.8, 137.8, -15.66, 148.35, -26.68, 17.28, 12.57]
X += [18.5, 94.82, 44.14, -49.37, 94.86, 138.89, 82.92, -21.36, 72.43, -6.14]
UNSIGNED = [255, 0, 64, 93, 240, 44, 253, 30, 86, 80, 88, 185, 120, 1, 185, 241, 170, 37, 156, 56]
SIGNED = [127, -43, 0, 19, 117, -13, 126, -23, 15, 11, 16, 81, 38, -42, 81, 118, 71, -18, 62, -5]
NF4 = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]

FOUR_BITS = Grid(4)


def how(
    format: WeightFormat = "int",
    grid: Grid = FOUR_BITS,
    granularity: Granularity = "group",
    group_size: int = 64,
) -> Scheme:
    return Scheme(format, grid, granularity, group_size, "min-max")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("symmetric", "scale", "zero", "codes", "error"),
    [(False, 0.7832156862745098, 64, UNSIGNED, 0.03), (True, 1.175984251968504, 0, SIGNED, 0.11)],
    ids=["asymmetric", "symmetric"],
)
def test_the_golden_vector(symmetric: bool, scale: float, zero: int, codes: list[int], error: float):
    x, on = torch.tensor([X]), Grid(8, symmetric)
    at = grid.steps(*calibrate.min_max([x], on), on)
    assert float(at.scale) == pytest.approx(scale, rel=1e-6)
    assert int(at.zero) == zero
    found = grid.quantize(x, at, on)
    assert found[0].tolist() == codes
    assert float((grid.dequantize(found, at) - x).square().mean()) == pytest.approx(error, abs=0.005)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_torchs_own(bits: int, symmetric: bool):
    x, on = normal(6, 32), Grid(bits, symmetric)
    at = grid.steps(*calibrate.min_max([x], on), on)
    ours = grid.dequantize(grid.quantize(x, at, on), at)
    theirs = torch.fake_quantize_per_channel_affine(
        x, at.scale[:, 0], at.zero[:, 0].int(), axis=0, quant_min=on.lowest, quant_max=on.highest
    )
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert float(((ours - x).abs() / at.scale).max()) <= (0.5 if symmetric else 1.0) + 1e-4


def test_scales_are_those_of_torchs_observers():
    x = normal(5, 64) + 0.3
    for symmetric, scheme in ((False, torch.per_channel_affine), (True, torch.per_channel_symmetric)):
        observer = PerChannelMinMaxObserver(
            ch_axis=0, dtype=torch.quint8 if not symmetric else torch.qint8, qscheme=scheme
        )
        observer(x)
        scale, zero = observer.calculate_qparams()
        on = Grid(8, symmetric)
        ours = grid.steps(*calibrate.min_max([x], on), on)
        # torch divides by 127.5 for symmetric grids, where the paper and the golden vector divide by 127.
        expected = scale * (127.5 / 127 if symmetric else 1)
        assert torch.allclose(ours.scale[:, 0], expected, rtol=1e-5)
        assert torch.equal(ours.zero[:, 0].int(), zero.int())


def test_ranges_over_batches_are_those_of_torchs_observers():
    batches = [normal(1, 50, seed=seed) * (seed + 1) for seed in range(6)]
    for ours, theirs in (
        (calibrate.min_max, MinMaxObserver()),
        (calibrate.moving_average, MovingAverageMinMaxObserver(averaging_constant=0.01)),
    ):
        for batch in batches:
            theirs(batch)
        low, high = ours(batches, Grid(8))
        assert float(low) == pytest.approx(float(theirs.min_val), rel=1e-6)
        assert float(high) == pytest.approx(float(theirs.max_val), rel=1e-6)


def test_percentiles_are_numpys():
    x = normal(3, 5001)
    low, high = calibrate.percentile([x[:, :2000], x[:, 2000:]], Grid(8))
    assert np.allclose(high, np.percentile(x.numpy(), 99.9, axis=1, method="inverted_cdf"))
    assert np.allclose(low, -np.percentile(-x.numpy(), 99.9, axis=1, method="inverted_cdf"))


def with_outlier() -> torch.Tensor:
    x = normal(2, 4096)
    x[0, 7] = 40.0
    return x


@pytest.mark.parametrize("name", ["mse", "entropy", "percentile"])
def test_an_outlier_is_cut_off(name: str):
    x, on = with_outlier(), Grid(4)
    low, high = calibrate.CALIBRATORS[name]([x], on)
    assert float(high[0]) < 10
    at, widest = grid.steps(low, high, on), grid.steps(*calibrate.min_max([x], on), on)
    error, worst = ((grid.dequantize(grid.quantize(x, s, on), s) - x)[:, 100:].square().mean() for s in (at, widest))
    assert error < worst / 4


def test_least_squares_are_never_worse_than_the_whole_range():
    x = with_outlier()
    for on in (Grid(3), Grid(4, symmetric=False)):
        found, widest = (grid.steps(*f([x], on), on) for f in (calibrate.mse, calibrate.min_max))
        ours, theirs = ((grid.dequantize(grid.quantize(x, s, on), s) - x).square().sum(1) for s in (found, widest))
        assert bool((ours <= theirs).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_powers_of_two(symmetric: bool):
    on = Grid(4, symmetric)
    x = normal(4, 64)
    scale = grid.steps(*calibrate.power_of_two([x], on), on).scale
    plain = grid.steps(*calibrate.min_max([x], on), on).scale
    exponent = torch.log2(scale)
    assert torch.allclose(exponent, exponent.round(), atol=1e-5)
    assert bool(((scale >= plain * 0.9999) & (scale < 2.0001 * plain)).all())


def test_granularity():
    x = normal(4, 128)
    assert [tuple(grid.blocks(x, g, 64).shape) for g in ("tensor", "channel", "group", "token")] == [
        (1, 512),
        (4, 128),
        (8, 64),
        (4, 128),
    ]
    with pytest.raises(UserError, match="groups of 60"):
        grid.blocks(x, "group", 60)
    errors = [
        float((round_trip(x, how(granularity=g, group_size=32))[0] - x).square().sum())
        for g in ("tensor", "channel", "group")
    ]
    assert errors[0] > errors[1] > errors[2]


def test_nf4_is_bitsandbytes_and_the_quantiles_of_a_normal():
    quantile = torch.distributions.Normal(0, 1).icdf
    offset = 0.9677083
    positive = quantile(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -quantile(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([positive, torch.zeros(1, dtype=torch.float64), negative]).sort().values
    table = bnb.get_4bit_type("nf4", device="cpu").double()
    assert torch.allclose(levels / levels.max(), table, atol=1e-6)
    assert torch.allclose(torch.tensor(NF4, dtype=torch.float64), table, atol=1e-6)
    weight = normal(64, 256)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(through_blocks_of_64(weight, "nf4"), bnb.dequantize_4bit(packed, state))


def test_what_scales_of_scales_cost():
    assert DOUBLE_QUANTIZATION == 0.126953125
    weight = normal(64, 256 * 4)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    bits = 8 * (packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes) / weight.numel()
    assert bits == 4 + DOUBLE_QUANTIZATION == round_trip(weight, how("nf4"))[1] / weight.numel()


def test_normal_weights_become_zero_so_often():
    weight = normal(1000, 1000)
    codes = ternary(weight, absmean(weight))
    assert float((codes == 0).float().mean()) == pytest.approx(0.310, abs=0.002)
    assert float((codes == 1).float().mean()) == pytest.approx(0.345, abs=0.002)
    assert float(absmean(torch.zeros(4))) == pytest.approx(1e-5)
    made, bits = round_trip(weight, how("ternary"))
    assert torch.equal(made, codes * weight.abs().mean())
    assert bits == 2 * weight.numel() + 32


@pytest.mark.parametrize("kind", ["int", "ternary", "nf4", "fp4"])
def test_what_is_kept_stays_and_stretches_nothing(kind: str):
    weight = normal(8, 64)
    large = weight.clone()
    large[2, 3] = 50.0
    scheme = how(kind, granularity="tensor")  # type: ignore[arg-type]
    kept, bits = round_trip(large, scheme, [(2, 3)])
    assert float(kept[2, 3]) == 50.0
    without = weight.clone()
    without[2, 3] = 0.0
    expected, plain_bits = round_trip(without, scheme)
    expected[2, 3] = 50.0
    assert torch.equal(kept, expected)
    assert bits == plain_bits + 96
    spoilt = round_trip(large, scheme)[0]
    assert (spoilt - large).square().sum() > (kept - large).square().sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_codes_take_exactly_their_bits_and_come_back(bits: int):
    on = Grid(bits)
    codes = torch.randint(on.lowest, on.highest + 1, (7, 11), generator=torch.Generator().manual_seed(0))
    packed = packing.pack(codes, on)
    assert packed.numel() == -(-7 * 11 * bits // 8)
    assert torch.equal(packing.unpack(packed, on, 77).reshape(7, 11).long(), codes)


def test_stored_matrices_come_back_to_the_last_bit(tmp_path: Path):
    schemes = {
        "a.weight": (how(grid=Grid(4, symmetric=False)), [(1, 2)]),
        "b.weight": (how(grid=Grid(3), granularity="channel"), []),
        "c.weight": (how("ternary"), [(0, 0), (3, 5)]),
    }
    made = {key: quantized(normal(8, 64, seed=n), *told) for n, (key, told) in enumerate(schemes.items())}
    rest = {"norm.weight": normal(8)}
    packing.save(tmp_path, made, rest, transposed={"b.weight"})
    state = packing.load(tmp_path, torch.float32)
    assert set(state) == {*made, "norm.weight"}
    for key, one in made.items():
        expected = one.dequantized()
        assert torch.equal(state[key], expected.T if key == "b.weight" else expected), key
    size = sum(one.num_bits for one in made.values()) / 8
    assert (tmp_path / packing.FILE).stat().st_size < size + 8 * 4 + 2000


def test_activations_by_token_and_by_observed_range():
    x, on = normal(2, 5, 16), Grid(8)
    ours = activations.rounded(x, on, None)
    scale = x.abs().amax(-1, keepdim=True) / 127
    assert torch.allclose(ours, (x / scale).round() * scale, atol=1e-6)
    kept = activations.rounded(x * torch.eye(16)[3].mul(99).add(1), on, None, keep=[3])
    assert torch.equal(kept[..., 3], x[..., 3] * 100)
    plain = x.clone()
    plain[..., 3] = 0
    assert torch.equal(kept[..., :3], activations.rounded(plain, on, None)[..., :3])


class Two(torch.nn.Module):
    """A model of two layers, the second of which sees four times the first one's output."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(4 * self.first(x))


def test_ranges_are_observed_layer_by_layer():
    torch.manual_seed(0)
    model, xs = Two(), [normal(1, 3, 4, seed=n) for n in range(3)]
    layers = {"first": model.first, "second": model.second}
    on = Grid(8, symmetric=False)
    how = activations.observe(model, layers, xs, on, "min-max", {})
    every = torch.cat(xs).reshape(1, -1)
    inner = 4 * model.first(torch.cat(xs)).detach().reshape(1, -1)
    for name, values in (("first", every), ("second", inner)):
        expected = grid.steps(*calibrate.min_max([values], on), on)
        assert torch.allclose(how.steps[name].scale, expected.scale)
        assert torch.equal(how.steps[name].zero, expected.zero)
    exact = model(xs[0])
    handles = activations.install(layers, how, {})
    rounded = model(xs[0])
    for handle in handles:
        handle.remove()
    assert not torch.equal(rounded, exact)
    assert torch.allclose(rounded, exact, atol=0.1)
    assert torch.equal(model(xs[0]), exact)


def test_weights_know_their_size():
    made = quantized(normal(4, 128), how(grid=Grid(4, symmetric=False), group_size=64))
    assert made.num_bits == 4 * 128 * 4 + 8 * (32 + 8)
    assert weights.TERNARY.bits == 2
