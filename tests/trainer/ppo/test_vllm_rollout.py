"""PPO whose answers another engine gives. There is no GPU here, so plain peft stands in for vLLM, under its calls."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.in_process import ALONE, make_data, make_step, train

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import Rslora
from ftlaunch.recipe.noise import NoNoise
from ftlaunch.recipe.stages import Ppo
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.spec import StageSpec
from fttrain.ppo import vllm_rollout

VLLM_ON_CPU = Path(__file__).parent / "vllm_on_cpu"


@pytest.fixture
def make(tiny_model: Path, rows_file: Path, tmp_path: Path) -> Callable[..., StageSpec]:
    (tmp_path / "rewards.py").write_text("def letters(prompt, answer, row):\n    return len(answer)\n")
    settings: dict[str, Any] = {
        "rollout_engine": "vllm",
        "rollout_size": 8,
        "ppo_epochs": 1,
        "steps": 3,
        "max_new_tokens": 4,
        "temperature": 0.7,
        "learning_rate": 0.05,
        "reward_function": f"{tmp_path}/rewards.py:letters",
    }
    rows = make_data(rows_file, completion=None, test=4)
    return lambda **more: make_step(tiny_model, rows, kind=Ppo, adapter=Rslora(rank=4, alpha=8), **settings | more)


@pytest.fixture
def vllm_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_rollout, "DEVICE", "cpu")
    monkeypatch.syspath_prepend(VLLM_ON_CPU)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(VLLM_ON_CPU), *sys.path]))
    monkeypatch.setenv("WORLD_SIZE", "1")


def test_what_it_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="not installed"):
        vllm_rollout.refuse_what_cannot_be(ALONE, ())
    monkeypatch.syspath_prepend(VLLM_ON_CPU)
    with pytest.raises(UserError, match="sees no GPU"):
        vllm_rollout.refuse_what_cannot_be(ALONE, ())
    monkeypatch.setattr(vllm_rollout, "DEVICE", "cpu")
    vllm_rollout.refuse_what_cannot_be(ALONE, ())
    with pytest.raises(UserError, match="activation function"):
        vllm_rollout.refuse_what_cannot_be(ALONE, (NoNoise(activation="relu"),))


@pytest.mark.usefixtures("vllm_on_cpu")
def test_each_rollout_is_of_the_policy_as_it_is_by_then(make: Callable[..., StageSpec], tmp_path: Path) -> None:
    """Its log-probabilities are the trainer's own; with the adapter of the rollout before they would not be."""
    lines = list(read_jsonl(train(make(evaluate_every=3), tmp_path).metrics))
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3]
    assert all(line["rollout_mismatch"] < 1e-5 for line in trained)
    assert abs(trained[-1]["kl"]) > 1e-3
    assert "eval/reward" in lines[-1]


@pytest.mark.usefixtures("vllm_on_cpu")
def test_an_engine_that_dies_ends_the_stage(
    make: Callable[..., StageSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path != str(VLLM_ON_CPU)))
    with pytest.raises(RuntimeError, match=r"vLLM has ended \(exit code 1\)"):
        train(make(), tmp_path)


@pytest.mark.parametrize(("visible", "expected"), [("3,5", "5"), (None, "1")])
def test_an_engine_is_on_its_ranks_own_gpu(visible: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    second = replace(ALONE, rank=1, size=2, local_rank=1, local_size=2, device=torch.device("cuda", 1))
    assert vllm_rollout._gpu(second) == expected
