"""Stages with noise: in training alone, the same after a stop, and with the activation function in what they leave."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.in_process import make_data, make_step, train
from transformers import AutoModelForCausalLM

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import Full, Lora
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.noise import (
    Adversarial,
    AlphaDropout,
    Dropout,
    DropPath,
    Gaussian,
    LockedDropout,
    Multiplicative,
    Noise,
    NoNoise,
    Poisson,
    Saturated,
    Uniform,
)
from ftlaunch.recipe.stages import Dpo, Merge, Orpo, Ppo
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir
from ftlaunch.run.spec import StageSpec
from fttrain.distributed.stop_request import StoppedEarly
from fttrain.merging.merge import find_source, merge
from fttrain.noise import replace_activations
from fttrain.preference import reference
from fttrain.tools import chat

VOLATILE = {"time", "tokens_per_second", "peak_memory_bytes"}
STILL = 1e-12
"""A learning rate at which nothing moves."""
Make = Callable[..., StageSpec]


@pytest.fixture
def make(tiny_model: Path, rows_file: Path) -> Make:
    return lambda **fields: make_step(tiny_model, make_data(rows_file, test=8), **fields)


def values(stage_dir: StageDir, key: str) -> list[float]:
    return [line[key] for line in read_jsonl(stage_dir.metrics) if key in line]


def course(stage_dir: StageDir) -> list[dict[str, Any]]:
    return [{key: line[key] for key in line if key not in VOLATILE} for line in read_jsonl(stage_dir.metrics)]


@pytest.fixture(scope="module")
def calm(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> StageDir:
    """A step in which nothing is learnt, without noise."""
    spec = make_step(tiny_model, make_data(rows_file, test=8), steps=1, learning_rate=STILL, evaluate_every=1)
    return train(spec, tmp_path_factory.mktemp("calm"))


LOUD: list[tuple[Noise, dict[str, Any]]] = [
    (Gaussian(std=0.5), {}),
    (Uniform(std=2.0, relative=True, sites=["mlp", "self_attn"]), {}),
    (Multiplicative(std=2.0), {}),
    (Poisson(), {}),
    (Dropout(probability=0.5, sites=r".*layers\.1"), {}),
    (LockedDropout(probability=0.5, sites=["embed_tokens"]), {"packing": False}),
    (DropPath(probability=0.5, sites=["mlp"]), {}),
    (AlphaDropout(probability=0.5), {}),
    (Adversarial(epsilon=1.0), {}),
    (Gaussian(std=0.5), {"r_drop": 1.0}),
    (NoNoise(), {"neftune_alpha": 30.0, "neftune_noise": "sign"}),
]


@pytest.mark.parametrize(("noise", "fields"), LOUD, ids=[f"{type(noise).__name__}{list(f)}" for noise, f in LOUD])
def test_noise_is_felt_in_training_and_never_in_evaluation(
    noise: Noise, fields: dict[str, Any], make: Make, calm: StageDir, tmp_path: Path
):
    spec = make(noise=noise, steps=1, learning_rate=STILL, evaluate_every=1, **fields)
    noisy = train(spec, tmp_path)
    assert all(abs(a - b) > 1e-4 for a, b in zip(values(noisy, "loss"), values(calm, "loss"), strict=True))
    assert values(noisy, "eval/loss") == pytest.approx(values(calm, "eval/loss"), abs=1e-6)


def test_r_drop_without_any_draw_is_cross_entropy(make: Make, calm: StageDir, tmp_path: Path):
    silent = train(make(r_drop=3.0, steps=1, learning_rate=STILL), tmp_path)
    assert values(silent, "loss") == pytest.approx(values(calm, "loss"), abs=1e-5)
    assert values(silent, "grad_norm") == pytest.approx(values(calm, "grad_norm"), rel=1e-4)
    assert values(silent, "r_drop/divergence") == [pytest.approx(0, abs=1e-6)]


@pytest.mark.parametrize(
    "noise",
    [Gaussian(std=0.3, schedule="linear"), LockedDropout(schedule="cosine"), Saturated(), Adversarial()],
    ids=lambda noise: type(noise).__name__,
)
def test_a_resumed_run_is_the_same_run(noise: Noise, make: Make, tmp_path: Path):
    spec = make(noise=noise, steps=5, neftune_alpha=5.0)
    whole = train(spec, tmp_path / "whole")
    with pytest.raises(StoppedEarly):
        train(spec, tmp_path / "parts", stop_after=3)
    parts = train(spec, tmp_path / "parts")
    assert course(parts) == course(whole)
    ours, theirs = (load_file(one.artifact / "adapter_model.safetensors") for one in (parts, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_recomputed_activations_have_the_same_noise(make: Make, tmp_path: Path):
    for noise in (Gaussian(std=0.5), DropPath(probability=0.5), Saturated(std=4.0)):
        kept, recomputed = (
            train(make(noise=noise, steps=3, activation_checkpointing=again), tmp_path / f"{type(noise)}{again}")
            for again in (False, True)
        )
        for key in ("loss", "grad_norm"):
            assert values(recomputed, key) == pytest.approx(values(kept, key), rel=1e-5)


def test_annealed_noise_ends(make: Make, tmp_path: Path):
    noises = (NoNoise(), Multiplicative(mean=4.0, std=1e-6, schedule="linear"))
    plain, noisy = (
        values(train(make(noise=noise, steps=6, learning_rate=STILL), tmp_path / str(number)), "loss")
        for number, noise in enumerate(noises)
    )
    apart = [abs(a - b) for a, b in zip(noisy, plain, strict=True)]
    assert apart[0] > 2 * apart[-1] > 0


def test_sites_that_are_not_there_are_named_with_those_that_are(make: Make, tmp_path: Path):
    with pytest.raises(UserError, match="fc9") as caught:
        train(make(noise=Gaussian(sites=["fc9"])), tmp_path)
    assert "act_fn" in caught.value.remedy


GOLU = Gaussian(activation="golu")
IDS = torch.arange(40)[None] + 40


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


class Gompertz(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.exp(-torch.exp(-x))


def by_hand(folder: Path, base: Path, activation: str) -> torch.Tensor:
    """Plain peft on a base whose activation functions are replaced here."""
    from peft import PeftModel

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    for layer in model.model.layers:
        layer.mlp.act_fn = {"golu": Gompertz, "relu": torch.nn.ReLU}[activation]()
    return logits(PeftModel.from_pretrained(model, folder))


def test_the_activation_function_goes_with_the_artifact(make: Make, tiny_model: Path, tmp_path: Path):
    first = train(make(noise=GOLU, steps=2), tmp_path)
    assert replace_activations.read(first.artifact) == (NoNoise(activation="golu"),)
    torch.testing.assert_close(logits(chat.load(str(first.artifact))[0]), by_hand(first.artifact, tiny_model, "golu"))
    ended = values(first, "eval/loss")[-1]

    second = make(start="01-sft/artifact", steps=1, learning_rate=STILL)
    assert values(train(second, tmp_path), "eval/loss") == [pytest.approx(ended, abs=1e-5)]
    assert replace_activations.read(tmp_path / "02-sft" / "artifact") == (NoNoise(activation="golu"),)

    with pytest.raises(UserError, match="no activation function golu") as caught:
        merge(find_source(first.artifact), tmp_path / "out", Merge())
    assert "unmerged" in caught.value.remedy


def test_a_merged_model_has_the_activation_function_in_its_config(make: Make, tiny_model: Path, tmp_path: Path):
    relu = Gaussian(activation="relu")
    done = train(make(noise=relu, steps=2), tmp_path)
    merged = merge(find_source(done.artifact), tmp_path / "out", Merge())
    assert merged.kl < 1e-9
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.config.hidden_act == "relu"
    torch.testing.assert_close(logits(plain), by_hand(done.artifact, tiny_model, "relu"), atol=1e-5, rtol=1e-4)


def test_a_model_trained_in_full_names_its_activation_function(make: Make, tmp_path: Path):
    known = train(make(noise=NoNoise(activation="relu"), adapter=Full(), steps=1), tmp_path / "known")
    assert AutoModelForCausalLM.from_pretrained(known.artifact).config.hidden_act == "relu"
    unknown = train(make(noise=GOLU, adapter=Full(), steps=1), tmp_path / "unknown")
    ended = values(unknown, "eval/loss")[-1]
    more = make(start="01-sft/artifact", steps=1, learning_rate=STILL, adapter=Lora(rank=2))
    assert values(train(more, tmp_path / "unknown"), "eval/loss") == [pytest.approx(ended, abs=1e-5)]
    config = msgspec.json.decode((unknown.artifact / "config.json").read_bytes())
    assert config["hidden_act"] == "golu"


def test_dpo_s_reference_hears_no_noise(tiny_model: Path, pairs: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: dict[str, list[torch.Tensor]] = {}
    live = reference.live

    def run(name: str, noise: Noise, kind: type = Dpo, **fields: Any) -> StageDir:
        said[name] = []

        def listening(engine: Any, micro: Any) -> torch.Tensor:
            said[name].append(live(engine, micro))
            return said[name][-1]

        monkeypatch.setattr(reference, "live", listening)
        spec = make_step(tiny_model, pairs, kind=kind, noise=noise, steps=2, learning_rate=STILL, **fields)
        return train(spec, tmp_path / name)

    silent, noisy = run("silent", NoNoise()), run("noisy", Gaussian(std=0.5))
    assert len(said["noisy"]) == 2
    for one, other in zip(said["silent"], said["noisy"], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert all(abs(a - b) > 1e-4 for a, b in zip(values(silent, "loss"), values(noisy, "loss"), strict=True))
    kept = run("kept", Gaussian(std=0.5), reference="precomputed")
    assert values(kept, "loss") == pytest.approx(values(noisy, "loss"), abs=1e-5)
    assert said["kept"] == []
    orpo = [run(f"orpo{std}", Gaussian(std=std), kind=Orpo) for std in (1e-9, 0.5)]
    assert all(abs(a - b) > 1e-4 for a, b in zip(*(values(one, "loss") for one in orpo), strict=True))


def test_a_reference_that_was_kept_is_of_the_same_activation_function(tiny_model: Path, pairs: Data, tmp_path: Path):
    """The policy at the start has the stage's function, and so has its reference, even where another was kept."""
    fields = {"kind": Dpo, "reference": "precomputed", "steps": 1, "learning_rate": STILL}
    train(make_step(tiny_model, pairs, **fields), tmp_path)
    (tmp_path / "01-dpo").rename(tmp_path / "before")
    other = train(make_step(tiny_model, pairs, noise=NoNoise(activation="relu"), **fields), tmp_path)
    assert values(other, "loss") == [pytest.approx(0.693147, abs=1e-5)]


def test_ppo_s_rollout_hears_no_noise(tiny_model: Path, rows_file: Path, tmp_path: Path):
    (tmp_path / "rewards.py").write_text("def length(prompt, answer, row):\n    return len(answer) / 4\n")
    fields = {
        "kind": Ppo,
        "reward_function": f"{tmp_path}/rewards.py:length",
        "rollout_size": 8,
        "ppo_epochs": 1,
        "max_new_tokens": 6,
        "steps": 2,
        "samples_every": 1,
        "learning_rate": STILL,
    }
    data = make_data(rows_file)
    silent, noisy = (
        train(make_step(tiny_model, data, noise=noise, **fields), tmp_path / type(noise).__name__)
        for noise in (NoNoise(), Gaussian(std=0.5))
    )
    silent_said, noisy_said = ([line["answer"] for line in read_jsonl(one.samples)] for one in (silent, noisy))
    assert silent_said == noisy_said != []
    assert max(values(noisy, "rollout_mismatch")) < 1e-5
    assert max(values(silent, "policy_change")) < 1e-9 < min(values(noisy, "policy_change"))


def test_a_frozen_copy_wears_what_the_policy_does(tiny_model: Path, rows_file: Path, tmp_path: Path):
    (tmp_path / "rewards.py").write_text("def length(prompt, answer, row):\n    return len(answer) / 4\n")
    fields = {"reward_function": f"{tmp_path}/rewards.py:length", "max_new_tokens": 6, "steps": 1}
    spec = make_step(
        tiny_model,
        make_data(rows_file),
        kind=Ppo,
        adapter=Full(),
        noise=NoNoise(activation="relu"),
        learning_rate=STILL,
        **fields,
    )
    assert values(train(spec, tmp_path), "kl") == [pytest.approx(0, abs=1e-5)]
