"""`ftlaunch compare` of runs of the tiny model: what it reads of them, and its table."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from tests.conftest import Launch
from tests.trainer.in_process import train

from ftlaunch.backend import backends
from ftlaunch.backend.prepare import prepare
from ftlaunch.compare.variants import trials, variants
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import RunDir

SWEEP = """
[sweep.variants]
lora = []
noisy = ["noise.kind=multiplicative", "noise.std=0.5"]
"""


def test_a_sweep_is_told_row_by_row(recipe: Callable[..., Path], launch: Launch, tmp_path: Path):
    path = recipe()
    path.write_text(path.read_text() + SWEEP)
    assert "ftlaunch compare" in launch("run", path, check=False).stderr
    assert launch("validate", path).stdout == "tiny.toml: ok — lora, noisy\n"

    settings = ["stage.0.steps=3"]
    planned = trials(variants([path], settings), 1, tmp_path / "out")
    for trial in planned:
        run = prepare(trial.plan, trial.loaded, backends.on(None))
        train(trial.plan.stages[0].spec, run.path)
    call = ("compare", path, "--set", *settings, "--dir", tmp_path / "out")
    again = launch(*call, "--json")
    assert again.stderr.splitlines()[-1] == "trial 2 of 2: noisy, seed 7: finished"
    rows = json.loads(again.stdout)
    assert [row["variant"] for row in rows] == ["lora", "noisy"]
    for row in rows:
        stage_dir = RunDir(Path(row["runs"][0])).stage_dir("01-sft")
        [measures] = row["measures"]
        evaluated = [line for line in read_jsonl(stage_dir.metrics) if "eval/loss" in line][-1]
        assert row["quality"]["eval/loss"]["mean"] == evaluated["eval/loss"]
        told = json.loads(stage_dir.evaluation.read_text())["rows"]
        assert len(told) == len(measures["row_losses"]) == 8
        nll, tokens = (sum(column) for column in zip(*told, strict=True))
        assert nll / tokens == pytest.approx(evaluated["eval/loss"], rel=1e-9)
        with safe_open(stage_dir.artifact / "adapter_model.safetensors", "pt") as file:
            count = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 not a dict
        assert measures["trained_parameters"] == count
    mine, theirs = (row["measures"][0]["row_losses"] for row in reversed(rows))
    difference = sum(a - b for a, b in zip(mine, theirs, strict=True)) / 8
    assert rows[1]["difference"]["mean"] == pytest.approx(difference)
    assert rows[1]["difference"]["pairs"] == 8

    head, *lines = launch(*call).stdout.splitlines()
    assert head.split()[:2] == ["variant", "eval/loss"]
    assert "[95 %, rows]" in head
    assert [line.split()[0] for line in lines] == ["lora", "noisy"]
    other = launch(*call, "--set", "stage.0.learning_rate=5e-3", check=False)
    assert other.returncode == 2
    assert "holds a run of another recipe or other settings\n  → name another folder with --dir" in other.stderr
