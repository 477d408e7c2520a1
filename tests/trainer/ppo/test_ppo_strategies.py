"""PPO is the same however its work is shared out: samples, rewards, losses and weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import RunStages

from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import RunDir, StageDir

RECIPE = """
name = "tiny"
seed = 7
[model]
path = "{model}"
dtype = "fp32"
[adapter]
kind = "lora"
rank = 4
alpha = 8
[data.rows]
path = "{rows}"
prompt = "{{question}}"
test = 6
[[stage]]
kind = "ppo"
data = "rows"
reward_function = "rewards.py:early"
steps = 8
rollout_size = 16
batch_size = 8
ppo_epochs = 2
max_new_tokens = 6
generation_batch_size = 3
learning_rate = 1e-2
samples_every = 1
[parallel]
device = "cpu"
"""
REWARDS = """
def early(prompt, answer, row):
    return sum(letter < "n" for letter in answer) / 6
"""
WAYS = ["ddp", "zero2", "zero3"]
COMPARED = ("loss", "grad_norm", "reward", "kl", "entropy", "value_loss", "explained_variance", "eval/reward")


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows_file: Path, run_stages: RunStages
) -> Callable[..., StageDir]:
    folder = tmp_path_factory.mktemp("ways")
    (folder / "rewards.py").write_text(REWARDS)
    path = folder / "tiny.toml"
    path.write_text(RECIPE.format(model=tiny_model, rows=rows_file))

    def of(way: str) -> StageDir:
        done = RunDir(folder / way)
        if not done.path.exists():
            shared = [] if way == "single" else ["parallel.procs_per_node=2"]
            run_stages(path, done.path, f"parallel.strategy={way}", *shared)
        return done.stage_dir("01-ppo")

    return of


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_do_what_one_does(way: str, run: Callable[[str], StageDir]):
    alone, shared = run("single"), run(way)
    said, said_2 = ([line["answer"] for line in read_jsonl(step.samples)] for step in (alone, shared))
    assert said == said_2
    for line, line_2 in zip(read_jsonl(alone.metrics), read_jsonl(shared.metrics), strict=True):
        for key in COMPARED:
            assert line_2.get(key) == pytest.approx(line.get(key), abs=1e-4), (line["step"], key)
    weights, weights_2 = (load_file(step.artifact / "adapter_model.safetensors") for step in (alone, shared))
    assert weights.keys() == weights_2.keys()
    for name, tensor in weights.items():
        assert torch.allclose(tensor, weights_2[name], atol=1e-3), name
