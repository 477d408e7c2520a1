"""`ftlaunch quantize` on tiny models: what is stored is what was measured, packed or not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.zoo.families import build
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from ftlaunch.errors import BAD_INPUT, DONE
from ftlaunch.tools import QuantizeOptions, SpikeLimits, UnpackOptions
from fttrain.evaluation import perplexity
from fttrain.quant.grid import Grid
from fttrain.quant.weights import Scheme, round_trip
from fttrain.tools import quantize, unpack
from fttrain.tools.output import answer


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Weights in bf16, stored as [inputs, outputs]."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_embd=64, n_layer=2, n_head=4, bos_token_id=257, eos_token_id=257)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Quantizes, or unpacks where that is asked for; returns (code, what it printed, what it complained)."""
    monkeypatch.setattr(quantize, "LENGTH", 64)

    def run(model: Path, out: Path, *, unpacked: bool = False, **options: Any) -> tuple[int, str, str]:
        capsys.readouterr()  # what fixtures made libraries say
        if unpacked:
            code = answer(unpack.main, UnpackOptions(source=str(model), out=str(out)))
        else:
            code = answer(quantize.main, QuantizeOptions(model=str(model), out=str(out), **options))
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_stacked_experts_are_no_linear_layers_and_are_refused(tmp_path: Path, call: Any):
    code, _, complaint = call(build("mixtral", tmp_path / "model"), tmp_path / "out")
    assert code == BAD_INPUT
    assert "of the body's weights in 16 bits, as linear layers are quantized and no stacked experts" in complaint
    assert not (tmp_path / "out").exists()


def test_what_sees_images_stays_as_it_is(tmp_path: Path, call: Any):
    model = build("gemma3, with vision", tmp_path / "model")
    assert call(model, tmp_path / "out", group_size=16)[0] == DONE
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight") and "vision" not in name}


@pytest.mark.parametrize("name", ["tiny_model", "gpt2"])
def test_what_is_stored_is_what_was_measured(name: str, request: pytest.FixtureRequest, tmp_path: Path, call: Any):
    model = request.getfixturevalue(name)
    plain, packed, again = tmp_path / "plain", tmp_path / "packed", tmp_path / "again"
    options: dict[str, Any] = {"bits": 3, "asymmetric": True, "group_size": 32, "json": True}
    code, said, _ = call(model, plain, **options)
    assert code == DONE
    report = json.loads(said)
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(plain), AutoTokenizer.from_pretrained(plain)
    windows = perplexity.windows(tokenizer, None, length=64, count=8)[4:]
    assert perplexity.perplexity(loaded.float(), windows) == pytest.approx(report["quantized"]["perplexity"], rel=1e-5)
    original = AutoModelForCausalLM.from_pretrained(model)
    assert perplexity.perplexity(original.float(), windows) == pytest.approx(report["original"]["perplexity"], rel=1e-5)
    theirs = original.state_dict()
    key = "model.layers.1.mlp.down_proj.weight" if name == "tiny_model" else "transformer.h.1.mlp.c_proj.weight"
    matrix = theirs[key] if name == "tiny_model" else theirs[key].T
    expected, _ = round_trip(matrix, Scheme("int", Grid(3, symmetric=False), "group", 32, "min-max"))
    expected = expected if name == "tiny_model" else expected.T
    dtype = torch.float32 if name == "tiny_model" else torch.bfloat16
    assert torch.equal(load_file(plain / "model.safetensors")[key], expected.to(dtype))
    assert report["bits_per_weight"] == 3 + (32 + 8) / 32

    call(model, packed, **options, packed=True)
    code, said, _ = call(packed, again, unpacked=True)
    assert (code, said) == (DONE, f"{again}: ready for model.path\n")
    ours, others = load_file(again / "model.safetensors"), load_file(plain / "model.safetensors")
    assert ours.keys() == others.keys()
    assert all(torch.equal(ours[key], others[key]) for key in others)
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (plain, packed)]
    assert sizes[1] < sizes[0]
    assert sizes[1] == json.loads((packed / quantize.REPORT).read_text())["quantized"]["bytes_on_disk"]


def test_ternary_weights_in_two_bits_come_back(tiny_model: Path, tmp_path: Path, call: Any):
    call(tiny_model, tmp_path / "plain", format="ternary")
    call(tiny_model, tmp_path / "packed", format="ternary", packed=True)
    call(tmp_path / "packed", tmp_path / "again", unpacked=True)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "plain"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert len(theirs["model.layers.0.mlp.up_proj.weight"].unique()) == 3


def test_super_weights_are_kept(tiny_model: Path, tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    mlp = model.model.layers[1].mlp
    torch.manual_seed(0)
    mlp.gate_proj.weight.data[7] = mlp.up_proj.weight.data[7] = 3 * torch.randn(64)
    mlp.down_proj.weight.data[5, 7] = 30.0
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(quantize, "SpikeLimits", lambda: SpikeLimits(relative=1.5, passes=1))  # of two layers' median
    place, key = [[5, 7]], "model.layers.1.mlp.down_proj"
    options: dict[str, Any] = {"granularity": "tensor", "bits": 4, "json": True}
    spoilt = json.loads(call(tmp_path / "model", tmp_path / "spoilt", **options)[1])
    kept = json.loads(call(tmp_path / "model", tmp_path / "kept", **options, protect=True)[1])
    assert spoilt["protected"] == {}
    assert kept["protected"] == {key: place}
    ours, theirs, original = (
        load_file(tmp_path / name / "model.safetensors")[f"{key}.weight"] for name in ("kept", "spoilt", "model")
    )
    assert float(ours[5, 7]) == 30.0
    assert (ours - original).square().sum() < (theirs - original).square().sum() / 10


def test_activations_and_the_table(tiny_model: Path, tmp_path: Path, call: Any):
    options: dict[str, Any] = {"bits": 8, "granularity": "channel", "calibrator": "percentile"}
    options |= {"activation_bits": 4, "activation_granularity": "tensor"}
    code, said, _ = call(tiny_model, tmp_path / "out", **options)
    assert code == DONE
    assert [row.split()[0] for row in said.splitlines()[1:4]] == ["original", "quantized", "with"]
    report = json.loads((tmp_path / "out" / quantize.REPORT).read_text())
    assert report["with_activations"]["kl"] > 10 * report["quantized"]["kl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 60}, "groups of 60 weights"),
        ({"format": "nf4", "packed": True}, "not stored in packed form"),
        ({"format": "ternary", "asymmetric": True}, "nothing calibrates"),
        ({"calibration": "x.txt"}, "calibrated on themselves"),
        ({"unpacked": True}, "holds no packed.json"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path, call: Any
):
    code, _, complaint = call(tiny_model, tmp_path / "out", **options)
    assert code == BAD_INPUT
    assert message in complaint
    assert not (tmp_path / "out").exists()
