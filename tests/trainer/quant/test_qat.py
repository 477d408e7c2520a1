"""Training through rounded weights: its arithmetic against torch's, and that what is left is what was trained."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tests.trainer.in_process import make_data, make_step, train
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config
from transformers.integrations.bitnet import ActQuant, WeightQuant

from ftlaunch.recipe.adapter import Full, Lora
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.model import BitLinear, Qat
from ftlaunch.recipe.stages import Dpo, Merge
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir
from ftlaunch.tools import QuantizeOptions
from fttrain import adapters
from fttrain.distributed.stop_request import StoppedEarly
from fttrain.merging import deltas
from fttrain.merging.merge import find_source, merge
from fttrain.merging.verify import distance
from fttrain.quant import qat
from fttrain.quant.qat import Rounding
from fttrain.tools import chat, quantize, unpack
from fttrain.tools.output import answer

QATS = {
    "qat": Qat(bits=4),
    "groups": Qat(bits=3, symmetric=False, granularity="group", group_size=32),
    "learned": Qat(bits=3, learned_step=True),
    "bitlinear": BitLinear(),
    "bitlinear normed": BitLinear(rms_norm=True),
}


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_and_its_gradient_are_torchs(symmetric: bool):
    ours, theirs, out_of = leaf(6, 32), leaf(6, 32), leaf(6, 32, seed=1).detach()
    rounded = Rounding(Qat(bits=4, symmetric=symmetric), False).matrix(ours, None)
    low, high = theirs.detach().aminmax(dim=1)
    scale = torch.maximum(-low, high) / 7 if symmetric else (high - low) / 15
    zero = torch.zeros(6, dtype=torch.int32) if symmetric else (-low / scale).round().int()
    lowest, highest = (-8, 7) if symmetric else (0, 15)
    expected = torch.fake_quantize_per_channel_affine(theirs, scale, zero, 0, lowest, highest)
    assert torch.allclose(rounded, expected, atol=1e-6)
    (rounded * out_of).sum().backward()
    assert ours.grad is not None
    assert torch.equal(ours.grad, out_of)


def test_the_gradient_of_a_learned_step_is_the_papers():
    """q - x/s inside and the bound outside, times 1 / √(N · q_max); and times s, as the logarithm is trained."""
    x, log_step, out_of = leaf(3, 40), torch.tensor([-2.0, -1.0, 0.5]).requires_grad_(), leaf(3, 40, seed=1).detach()
    rounded = Rounding(Qat(bits=3, learned_step=True), False).matrix(x, log_step)
    (rounded * out_of).sum().backward()
    s = log_step.detach().exp()[:, None]
    v = x.detach() / s
    inside = (v >= -4) & (v <= 3)
    assert inside.any()
    assert not inside.all()
    assert torch.allclose(rounded, v.clamp(-4, 3).round() * s, atol=1e-6)
    of_step = torch.where(inside, v.round() - v, v.clamp(-4, 3))
    expected = (of_step * out_of).sum(1) * s[:, 0] * (40 * 3) ** -0.5
    assert log_step.grad is not None
    assert torch.allclose(log_step.grad, expected, atol=1e-5)
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.where(inside, out_of, 0.0), atol=1e-6)


def test_bitlinear_is_transformers_own():
    x, weight = leaf(2, 5, 32), leaf(16, 32, seed=2)
    rounding = Rounding(BitLinear(), False)
    # transformers compiles both, and the compiler's cache may hold kernels for the vector units of another machine.
    with torch.compiler.set_stance("force_eager"):
        theirs, their_inputs = WeightQuant.apply(weight), ActQuant.apply(x)
    assert torch.allclose(rounding.matrix(weight, None), theirs, atol=1e-6)
    assert torch.allclose(rounding.inputs(x), their_inputs, atol=1e-6)
    rounding.matrix(weight, None).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(16, 32))
    normed = Rounding(BitLinear(rms_norm=True), False).inputs(x)
    assert torch.allclose(normed.square().mean(-1), torch.ones(2, 5), atol=0.05)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_embd=64, n_layer=2, n_head=4, bos_token_id=257, eos_token_id=257)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


IDS = torch.arange(40)[None] + 40


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits[0].float()


@pytest.mark.parametrize("name", ["tiny_model", "gpt2"])
def test_with_an_adapter_the_sum_is_rounded(name: str, request: pytest.FixtureRequest):
    """Against plain layers that were given the rounded sum."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(request.getfixturevalue(name)),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(std=0.05)
    qat.install(model, QATS["groups"])
    ours = logits(model)
    with model.disable_adapter():
        off = logits(model)
    plain = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(name))
    bare = logits(plain)
    for given in (off, ours):
        rounding = {key: one for key, (one, _) in qat.roundings(model).items()}
        fresh = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(name))
        for key, layer in qat.layers(model):
            weight = layer.base_layer.weight.data
            if given is ours:
                weight = weight + layer.get_delta_weight("default")
            fresh.get_submodule(key).weight.data = rounding[f"{key}.weight"].stored(weight, None)
        assert torch.allclose(logits(fresh), given, atol=1e-4)
    assert not torch.allclose(bare, off, atol=1e-3)
    assert not torch.allclose(ours, off, atol=1e-3)


def told(stage_dir: StageDir) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in read_jsonl(stage_dir.metrics) if "loss" in line]


@pytest.mark.parametrize("name", QATS)
def test_the_merged_model_is_the_one_that_was_trained(name: str, tmp_path: Path, tiny_model: Path, rows_file: Path):
    spec = make_step(
        tiny_model,
        make_data(rows_file, test=8),
        adapter=Lora(rank=4, alpha=8),
        model_fields={"quantization": QATS[name]},
        steps=4,
    )
    calm = train(spec, tmp_path / "calm")
    with pytest.raises(StoppedEarly):
        train(spec, tmp_path / "stopped", stop_after=3)
    resumed = train(spec, tmp_path / "stopped")
    assert told(resumed) == told(calm)
    tensors = [load_file(step.artifact / "adapter_model.safetensors") for step in (calm, resumed)]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    assert (calm.artifact / qat.STEPS_FILE).exists() == (name == "learned")

    out = tmp_path / "merged"
    merged = merge(find_source(calm.artifact), out, Merge())
    assert merged.kl < 1e-6
    assert merged.top1_agreement == 1.0
    answering = [logits(chat.load(str(folder))[0].float()) for folder in (calm.artifact, out)]
    assert torch.allclose(*answering, atol=1e-4)

    adapted = adapters.with_saved(AutoModelForCausalLM.from_pretrained(tiny_model), calm.artifact)
    added = deltas.deltas(adapted, adapters.TRAINED)
    state, base = load_file(out / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    key = "model.layers.1.mlp.down_proj.weight"
    whole = added[key].on(base[key], torch.float32)
    if name == "qat":
        scale = whole.abs().amax(1, keepdim=True) / 7
        assert torch.allclose(state[key], (whole / scale).round() * scale, atol=1e-6)
    limit = {"qat": 16, "groups": 3 * 8, "learned": 8}.get(name, 3)
    assert max(len(row.unique()) for row in state[key]) <= limit
    assert json.loads((out / qat.CARD).read_text())["kind"] == ("bitlinear" if "bit" in name else "qat")


@pytest.mark.parametrize("name", ["qat", "learned", "bitlinear"])
def test_all_weights_are_trained_through_rounding(name: str, tmp_path: Path, tiny_model: Path, rows_file: Path):
    """The artifact holds the rounded weights; evaluated as they are, they are the model that training evaluated."""
    spec = make_step(
        tiny_model,
        make_data(rows_file, test=8),
        adapter=Full(),
        model_fields={"quantization": QATS[name]},
        learning_rate=3e-3,
    )
    step = train(spec, tmp_path)
    losses = [loss for loss, _ in told(step)]
    assert losses[-1] < losses[0]
    state = load_file(step.artifact / "model.safetensors")
    key = "model.layers.1.mlp.down_proj.weight"
    assert max(len(row.unique()) for row in state[key]) <= {"qat": 16, "learned": 8, "bitlinear": 3}[name]
    assert not any(qat.STEP in key for key in state)
    model, _ = chat.load(str(step.artifact))
    if name != "learned":  # a range is found again in what was rounded by it, and ternary weights keep their scale
        again = AutoModelForCausalLM.from_pretrained(step.artifact)
        if name == "qat":
            qat.install(again, QATS[name])
        else:
            qat.round_inputs(again, QATS[name])
        assert distance([logits(model)], [logits(again)]).kl < 1e-9


def test_a_reference_of_rounded_weights_is_computed_once(tmp_path: Path, tiny_model: Path, pairs: Data):
    """It is kept under a name that says how they are rounded."""
    for name in ("qat", "learned"):
        fields = {"quantization": QATS[name]}
        spec = make_step(tiny_model, pairs, adapter=Full(), model_fields=fields, kind=Dpo, steps=1)
        assert told(train(spec, tmp_path / name))[0][0] == pytest.approx(math.log(2), abs=1e-5)


def test_trained_ternary_weights_are_packed_in_two_bits(
    tmp_path: Path, tiny_model: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
):
    fields = {"quantization": BitLinear(), "dtype": "bf16"}
    spec = make_step(tiny_model, make_data(rows_file, test=8), adapter=Full(), model_fields=fields, steps=2)
    artifact = train(spec, tmp_path).artifact
    monkeypatch.setattr(quantize, "LENGTH", 64)
    options = QuantizeOptions(model=str(artifact), out=str(tmp_path / "packed"), format="ternary", packed=True)
    assert answer(quantize.main, options) == 0
    report = json.loads((tmp_path / "packed" / quantize.REPORT).read_text())
    assert report["bits_per_weight"] < 2.02
    assert report["quantized"]["max_logit_difference"] == 0.0
    unpack.unpack(tmp_path / "packed", tmp_path / "again")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", artifact))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
