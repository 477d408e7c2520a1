"""A run in the shell of another launcher: it neither waits for that one's peers nor computes otherwise."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Launch
from tests.trainer.in_process import train

from ftlaunch.plan.plan import make_plan
from ftlaunch.rules import load_and_check
from ftlaunch.run.files import read_jsonl

FOREIGN = {
    **{"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "NODE_RANK": "1"},
    **{"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"},
    **{"PMI_SIZE": "4", "PMI_RANK": "1", "TORCHELASTIC_RUN_ID": "x", "PET_NNODES": "2"},
    **{"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_MIXED_PRECISION": "bf16"},
    **{"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_FSDP": "true", "DS_ACCELERATOR": "cuda"},
}


def test_variables_of_another_launcher_change_nothing(
    recipe: Callable[..., Path], launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["stage.0.steps=2", "data.rows.test=0"]
    plan = make_plan(load_and_check(recipe(), settings).recipe, tmp_path / "alone")
    alone = train(plan.stages[0].spec, tmp_path / "alone")

    for name, value in FOREIGN.items():
        monkeypatch.setenv(name, value)
    launch("run", recipe(), *(part for one in settings for part in ("--set", one)), "--run-dir", tmp_path / "run")

    of_both = [list(read_jsonl(path)) for path in (alone.metrics, tmp_path / "run" / "01-sft" / "metrics.jsonl")]
    expected, found = ([(line["loss"], line["grad_norm"]) for line in lines if "loss" in line] for lines in of_both)
    assert len(found) == 2
    assert found == [pytest.approx(line, rel=1e-6) for line in expected]
