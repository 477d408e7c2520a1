"""Planted super weights are found where they were planted; the ablations do what they say, and leave no trace."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from tests.trainer.in_process import make_data, make_step, train
from tests.zoo.families import build
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from ftlaunch.errors import BAD_INPUT, UserError
from ftlaunch.recipe.adapter import Lora
from ftlaunch.tools import SpikeLimits, SuperweightsOptions
from fttrain.evaluation import perplexity as texts
from fttrain.superweights import ablate, known
from fttrain.superweights.find import attention_spikes, find, spikes
from fttrain.superweights.projections import Place, down_projections, scaled, unseen
from fttrain.tools import superweights as tool
from fttrain.tools.output import answer

LAYER, ROW, COLUMN = 1, 5, 17
IDS = torch.arange(12)[None] + 40
LLAMA = LlamaConfig(
    vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, eos_token_id=257
)
GPT2 = GPT2Config(vocab_size=258, n_embd=32, n_layer=4, n_head=4, bos_token_id=257, eos_token_id=257)


def plant(config: Any) -> Any:
    """A tiny model in which one input channel of one down projection is large at its first token only, and a weight."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    down = down_projections(model)[LAYER]

    def enlarge(_module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        x = inputs[0].clone()
        x[:, :, COLUMN] = 0.0
        x[:, 0, COLUMN] = 300.0
        return (x,)

    down.module.register_forward_pre_hook(enlarge)
    down.module.weight.data[(ROW, COLUMN) if config.model_type == "llama" else (COLUMN, ROW)] = 4.0
    return model


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["linear", "conv1d"])
def test_the_planted_weight_is_found_and_nothing_after_it(config: Any):
    model = plant(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = find(model, IDS, SpikeLimits())
    assert found.places == [Place(LAYER, ROW, COLUMN)]
    (weight,) = found.weights
    assert weight.weight == 4.0
    assert weight.input == 300.0
    assert weight.share == pytest.approx(1.0, abs=0.01)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with scaled(down_projections(model), found.places, 0.0):
        index = (ROW, COLUMN) if config.model_type == "llama" else (COLUMN, ROW)
        assert down_projections(model)[LAYER].module.weight[index] == 0.0
        assert find(model, IDS, SpikeLimits()).places == []


def test_layers_of_images_are_not_taken_for_those_of_text_and_layers_with_experts_are_named(tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(build("gemma3, with vision", tmp_path / "images"))
    assert all("language_model" in one.name for one in down_projections(model).values())
    assert unseen(model) == ""
    model = AutoModelForCausalLM.from_pretrained(build("deepseek_v3", tmp_path / "experts"))
    assert unseen(model) == "not looked at, for experts or an MLP that is not known: layers 1"


def test_weights_that_hide_behind_another_are_found_in_the_next_pass():
    model = plant(LLAMA)
    down_projections(model)[LAYER].module.weight.data[9, COLUMN] = 3.0
    assert find(model, IDS, SpikeLimits()).places == [Place(LAYER, ROW, COLUMN), Place(LAYER, 9, COLUMN)]
    assert find(model, IDS, SpikeLimits(passes=1)).places == [Place(LAYER, ROW, COLUMN)]


def test_limits_are_what_they_say():
    """The spikes are 300 in and 1200 out; the other layers' are below 1."""
    model = plant(LLAMA)
    assert find(model, IDS, SpikeLimits(absolute=299, relative=0)).weights
    assert not find(model, IDS, SpikeLimits(absolute=301, relative=0)).weights
    seen = spikes(model, IDS, down_projections(model).values())
    median = sorted(abs(spike.input) for spike in seen)
    ratio = 300 / ((median[1] + median[2]) / 2)
    assert find(model, IDS, SpikeLimits(absolute=0, relative=ratio * 0.99)).weights
    assert not find(model, IDS, SpikeLimits(absolute=0, relative=ratio * 1.01)).weights


def test_a_spike_of_many_small_products_is_no_super_weight():
    model = plant(LLAMA)
    matrix = down_projections(model)[LAYER].matrix
    matrix[ROW, COLUMN] = 0.0
    matrix[ROW] = 2.0

    def all_large(_module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        x = inputs[0].clone()
        x[:, 0] = 100.0
        return (x,)

    down_projections(model)[LAYER].module.register_forward_pre_hook(all_large)
    found = find(model, IDS, SpikeLimits())
    assert found.weights == []
    assert [spike.layer for spike in found.unexplained] == [LAYER]


def test_attention_spikes_name_layers():
    model = plant(LLAMA)
    model.model.layers[2].self_attn.o_proj.weight.data[3] = 1e4
    (spike,) = attention_spikes(model, IDS, SpikeLimits())
    assert (spike.layer, spike.row, spike.module) == (2, 3, "model.layers.2.self_attn.o_proj")


def test_random_weights_are_of_like_size_and_others():
    model = plant(LLAMA)
    down = down_projections(model)
    torch.manual_seed(1)
    for projection in down.values():
        projection.module.weight.data.normal_()
    places = [Place(0, 1, 2), Place(3, 4, 5)]
    others = ablate.random_like(down, places, 100, seed=0)
    assert len(set(others)) == 100
    assert not set(others) & set(places)
    assert others == ablate.random_like(down, places, 100, seed=0) != ablate.random_like(down, places, 100, seed=1)
    for place, near in zip(places, (others[:50], others[50:]), strict=True):
        size = down[place.layer].matrix[place.row, place.column].abs()
        assert all((down[one.layer].matrix[one.row, one.column].abs() - size).abs() < 0.15 for one in near)


def test_ablations_against_the_model_edited_by_hand():
    model = plant(LLAMA)
    down, place = down_projections(model), Place(LAYER, ROW, COLUMN)
    windows = [IDS, IDS + 7]
    original = texts.perplexity(model, windows)
    by_hand = torch.cat(
        [-model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).detach()[:, 0] for ids in windows]
    )
    assert original == pytest.approx(float(by_hand.mean().exp()))
    without = ablate.at_scale(model, down, [place], windows)
    curve = {factor: ablate.at_scale(model, down, [place], windows, factor) for factor in ablate.SCALES}
    assert curve[1.0] == original
    assert curve[0.0] == without != original
    # The channel counts at the first token only: with that one output put back nothing is missing.
    assert ablate.restored(model, down, [place], windows) == pytest.approx(original)
    assert texts.perplexity(model, windows) == original


def test_published_coordinates_go_by_the_models_name():
    assert known.published("mistralai/Mistral-7B-v0.1") == [Place(1, 2070, 7310)]
    assert known.published("/models/mistral-7b-v0.1/") == [Place(1, 2070, 7310)]
    assert known.published("smollm2") == []


@pytest.fixture
def planted(tmp_path: Path, tiny_model: Path) -> Path:
    """A model folder named like a published one, with a real super weight: a channel that one token always excites."""
    folder = tmp_path / "gemma-7b"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    config = LlamaConfig(**{**LLAMA.to_dict(), "vocab_size": len(tokenizer)})
    model = AutoModelForCausalLM.from_config(config)
    mlp = model.model.layers[LAYER].mlp
    mlp.gate_proj.weight.data[COLUMN] = mlp.up_proj.weight.data[COLUMN] = 3 * torch.randn(32)
    mlp.down_proj.weight.data[ROW, COLUMN] = 30.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_tool_reports_and_draws(planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    options = SuperweightsOptions(model=str(planted), out=str(out), limits=SpikeLimits(relative=5), ablate=True)
    assert answer(tool.main, structs.replace(options, attention_spikes=True)) == 0
    said = capsys.readouterr().out
    assert "perplexity without" in said
    assert ", computed in fp32" in said
    assert "published: missed [[0, 1995, 21041]]" in said
    assert answer(tool.main, structs.replace(options, json=True)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "superweights.json").read_text())
    found = report["weights"][0]
    assert (found["layer"], found["row"], found["column"]) == (LAYER, ROW, COLUMN)
    perplexity = report["perplexity"]
    assert len(perplexity["without_each"]) == len(report["weights"])
    assert perplexity["scaled"]["1.0"] == perplexity["original"]
    assert perplexity["random_weights"] == 100
    assert len(report["spikes"]) == 4
    for name in ("inputs.png", "outputs.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"


def test_a_wrong_text_is_a_users_mistake(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = str(tmp_path / "none.csv")
    assert (
        answer(tool.main, SuperweightsOptions(model=str(tiny_model), out=str(tmp_path / "out"), text=text)) == BAD_INPUT
    )
    assert "no such file" in capsys.readouterr().err


def test_windows_of_text(tiny_model: Path, rows_file: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    short = tmp_path / "short.txt"
    short.write_text("abcdefghij")
    assert tokenizer.decode(texts.windows(tokenizer, short, length=4, count=9)[1][0]) == "efgh"
    assert [w.shape for w in texts.windows(tokenizer, short, length=4, count=9)] == [(1, 4), (1, 4)]
    assert texts.windows(tokenizer, short, length=64, count=9)[0].shape == (1, 10)
    first = json.loads(rows_file.read_text().splitlines()[0])
    (window,) = texts.windows(tokenizer, rows_file, length=16, count=1)
    assert f"{first['question']} {first['answer']}".startswith(tokenizer.decode(window[0])[:10])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="holds no text"):
        texts.windows(tokenizer, tmp_path / "empty.txt", length=16, count=1)
    assert len(texts.windows(tokenizer, None, length=128, count=4)) == 4


def test_adapters_on_layers_with_super_weights(planted: Path, tiny_model: Path, rows_file: Path, tmp_path: Path):
    adapter = Lora(rank=2, alpha=4, targets=["down_proj", "q_proj"], layers="super-weights")
    step = train(make_step(planted, make_data(rows_file), adapter=adapter, steps=2), tmp_path / "run")
    config = json.loads((step.artifact / "adapter_config.json").read_text())
    ends = ("mlp.down_proj", "self_attn.q_proj")
    assert set(config["target_modules"]) == {f"model.layers.{LAYER}.{end}" for end in ends}
    with pytest.raises(UserError, match="has none"):
        train(make_step(tiny_model, make_data(rows_file), adapter=adapter, steps=2), tmp_path / "none")
