"""PPO on a tiny model: what it learns, what it keeps, and that a resumed run is the same run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tests.trainer.in_process import make_data, make_step, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import Full, Lora
from ftlaunch.recipe.stages import Ppo
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir
from ftlaunch.run.spec import StageSpec
from fttrain.distributed.stop_request import StoppedEarly

REWARDS = '''
def early(prompt, answer, row):
    """The share of three letters that come before n."""
    return sum(letter < "n" for letter in answer) / 3

def broken(prompt, answer, row):
    return float("nan")
'''
VOLATILE = {"time", "tokens_per_second", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights so large that an adapter of rank 4 can say anything with it."""
    folder = tmp_path_factory.mktemp("bold") / "model"
    bold: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(0)
    for parameter in bold.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    bold.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture(scope="module")
def make(model: Path, rows_file: Path, rewards: Path) -> Callable[..., StageSpec]:
    def call(**fields: Any) -> StageSpec:
        settings = {
            "rollout_size": 16,
            "batch_size": 8,
            "micro_batch_size": 4,
            "ppo_epochs": 2,
            "max_new_tokens": 3,
            "schedule": "constant",
            "learning_rate": 2e-2,
            "samples_every": 1,
            "reward_function": f"{rewards}:early",
            "steps": 10,
            **fields,
        }
        return make_step(model, make_data(rows_file, completion=None, test=8), kind=Ppo, **settings)

    return call


def metrics(stage_dir: StageDir) -> list[dict]:
    """Of every optimizer step, checked to be each step once."""
    lines = [
        {key: value for key, value in line.items() if key not in VOLATILE} for line in read_jsonl(stage_dir.metrics)
    ]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, len(trained) + 1))
    return lines


def samples(stage_dir: StageDir) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "time"} for line in read_jsonl(stage_dir.samples)]


def adapter(stage_dir: StageDir) -> dict[str, torch.Tensor]:
    return load_file(stage_dir.artifact / "adapter_model.safetensors")


EACH = 4
"""Passes over the answers of a rollout, each one optimizer step."""


@pytest.fixture(scope="module")
def learn(make: Callable[..., StageSpec], tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], list[dict]]:
    """Metrics of a run of 12 large rollouts whose KL costs so much a nat."""

    def call(kl_coefficient: float) -> list[dict]:
        bulk = {"rollout_size": 64, "batch_size": 64, "micro_batch_size": 64, "generation_batch_size": 64}
        step = make(**bulk, ppo_epochs=EACH, steps=12 * EACH, kl_coefficient=kl_coefficient, save_every=100)
        return metrics(train(step, tmp_path_factory.mktemp("learn")))

    return call


def of_rollouts(lines: list[dict]) -> list[dict]:
    """The first optimizer step of each rollout."""
    return [line for line in lines if "loss" in line][::EACH]


def last_mean(lines: list[dict], key: str) -> float:
    return sum(line[key] for line in of_rollouts(lines)[-3:]) / 3


def test_samples_hold_what_was_said_and_what_it_was_worth(
    make: Callable[..., StageSpec], tmp_path: Path, rows_file: Path
):
    step = train(make(samples_every=2), tmp_path)
    found = samples(step)
    assert sorted({line["step"] for line in found}) == [1, 9]
    questions = {json.loads(row)["question"] for row in rows_file.read_text().splitlines()}
    for line in found:
        assert line["prompt"] in questions
        assert line["reward"] == pytest.approx(sum(letter < "n" for letter in line["answer"]) / 3)
        assert line["ended"] or len(line["answer"]) <= 3


def test_it_raises_a_reward_that_can_be_checked(learn: Callable[[float], list[dict]]):
    """Where a run ends depends on how a machine rounds, so bounds are half of what any seed or kernel set gave."""
    lines = learn(0.005)
    first_inner = of_rollouts(lines)
    for line in first_inner:  # what is trained is what was sampled
        assert line["clip_fraction"] == 0
        assert line["policy_change"] == pytest.approx(0, abs=1e-6)
        assert line["rollout_mismatch"] < 1e-5
    assert any(line["clip_fraction"] > 0.1 for line in lines[1:-1])
    assert first_inner[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert last_mean(lines, "reward") - first_inner[0]["reward"] > 0.12
    assert lines[-1]["eval/reward"] - first_inner[0]["reward"] > 0.15
    assert last_mean(lines, "entropy") < first_inner[0]["entropy"]
    assert {"value_loss", "policy_loss", "explained_variance", "answer_tokens", "answers_ended"} <= lines[0].keys()

    dear = learn(1.0)
    assert last_mean(lines, "kl") > 1.5 * last_mean(dear, "kl") > 0, "a dear KL keeps the policy near its reference"


@pytest.mark.parametrize("stop_after", [1, 2, 4, 7])
def test_a_resumed_run_is_the_same_run(stop_after: int, make: Callable[..., StageSpec], tmp_path: Path):
    step = make(score_scaling="running", kl_target=0.5, kl_horizon=50, missing_eos_penalty=0.1, evaluate_every=5)
    calm = train(step, tmp_path / "calm")
    with pytest.raises(StoppedEarly):
        train(step, tmp_path / "stopped", stop_after=stop_after)
    stopped = train(step, tmp_path / "stopped")
    assert metrics(stopped) == metrics(calm)
    assert samples(stopped) == samples(calm)
    assert len({line["kl_coefficient"] for line in metrics(calm) if "loss" in line}) == 3
    assert all(torch.equal(tensor, adapter(calm)[name]) for name, tensor in adapter(stopped).items())
    best = max((line for line in metrics(calm) if "eval/reward" in line), key=lambda line: line["eval/reward"])
    told = {"step": best["step"], "by": "reward", "score": best["eval/reward"]}
    assert [json.loads(done.result.read_text())["best"] for done in (calm, stopped)] == [told, told]


def test_the_artifact_is_the_policy_and_the_next_stage_goes_on_from_it(make: Callable[..., StageSpec], tmp_path: Path):
    first = make(steps=8, save_every=8)
    step = train(first, tmp_path)
    assert sorted(path.name for path in step.artifact.iterdir() if path.is_dir()) == []
    assert not any("value" in name or "reference" in name for name in adapter(step))
    plain: Any = AutoPeftModelForCausalLM.from_pretrained(step.artifact)
    assert any(tensor.any() for name, tensor in plain.named_parameters() if "lora_B" in name)

    again = train(replace(first, start="../01-ppo/artifact"), tmp_path / "next")
    line = metrics(again)[0]
    assert line["kl"] == pytest.approx(0, abs=1e-5)  # its reference is the adapter it found, not the base
    assert abs(metrics(again)[-2]["kl"]) > 0.01
    assert sorted(path.name for path in again.artifact.iterdir() if path.is_dir()) == []


def test_full_fine_tuning_has_a_frozen_copy_as_its_reference(make: Callable[..., StageSpec], tmp_path: Path):
    full = replace(make(steps=6, learning_rate=1e-3), adapter=Full(), learning_rate=1e-3)
    step = train(full, tmp_path)
    lines = metrics(step)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert abs(lines[5]["kl"]) > 1e-3
    names = load_file(step.artifact / "model.safetensors").keys()
    assert not any("value_head" in name or "frozen" in name for name in names)
    AutoModelForCausalLM.from_pretrained(step.artifact)


def test_a_score_that_is_no_number_names_function_and_row(
    make: Callable[..., StageSpec], tmp_path: Path, rewards: Path
):
    with pytest.raises(UserError, match=r"broken returned nan for the answer to .*rows\.jsonl:\d+"):
        train(make(reward_function=f"{rewards}:broken"), tmp_path)


def test_prompts_that_are_too_long_are_left_out(make: Callable[..., StageSpec], tmp_path: Path):
    step = make()
    data = replace(step.data["rows0"], max_length=8)
    with pytest.raises(UserError, match="none of the 48 rows has a prompt of at most 8 tokens"):
        train(replace(step, data={"rows0": data}), tmp_path)


def test_an_adapter_on_the_embedding_trains(make: Callable[..., StageSpec], tmp_path: Path):
    spec = replace(make(steps=2), adapter=Lora(targets=["embed_tokens", "q_proj"], rank=2, alpha=4))
    assert of_rollouts(metrics(train(spec, tmp_path)))
