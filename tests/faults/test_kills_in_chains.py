"""A rank killed in a stage after SFT, of pairs or PPO: the resumed stage ends with the bits of one left alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.faults.rank_faults import Fault
from tests.faults.ranks import Ranks, said, with_parallel, write_run
from tests.faults.test_kills import outcome
from tests.trainer.conftest import RECIPE, make_pairs

from ftlaunch.load import load_recipe
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.run.layout import RunDir

SECOND = """
[data.pairs]
path = "{pairs}"
format = "preference"
test = 4
[[stage]]
kind = "{kind}"
data = "pairs"
steps = 6
batch_size = 8
learning_rate = 1e-2
save_every = 2
"""
PPO = """
reward_function = "rewards.py:length"
rollout_size = 16
ppo_epochs = 2
max_new_tokens = 4
score_scaling = "running"
kl_target = 1.0
"""


@pytest.fixture
def chain(tiny_model: Path, rows_file: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """The tiny recipe, with dropout, and a second stage after its SFT."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in make_pairs()))

    def of(kind: str) -> Recipe:
        path = tmp_path / f"{kind}.toml"
        first = RECIPE.format(model=tiny_model, rows=rows_file, dropout=0.1)
        (tmp_path / "rewards.py").write_text("def length(prompt, answer, row):\n    return len(answer)\n")
        rewarded = PPO if kind == "ppo" else ""
        path.write_text(first + SECOND.format(pairs=pairs, kind=kind) + rewarded)
        return load_recipe(path, ["stage.sft.steps=2"]).recipe

    return of


@pytest.mark.parametrize(
    ("kind", "strategy"), [("reward", "ddp"), ("dpo", "zero3"), ("orpo", "zero2"), ("ppo", "zero2")]
)
def test_a_killed_stage_ends_as_if_it_had_not_been(
    kind: str, strategy: str, chain: Callable[..., Recipe], ranks: Ranks, tmp_path: Path
):
    calm = write_run(with_parallel(chain(kind), strategy, 2), tmp_path / "calm")
    ranks.run(calm.stage_dir("01-sft"))
    killed = RunDir(Path(shutil.copytree(calm.path, tmp_path / "killed")))
    expected, step = calm.stage_dir(f"02-{kind}"), killed.stage_dir(f"02-{kind}")
    ranks.run(expected)
    ranks.start(step, Fault("kill", step=4, rank=1, at="save"))
    assert any(ranks.wait())
    assert not step.result.exists()
    ranks.run(step)
    assert outcome(step) == outcome(expected), said(step)
