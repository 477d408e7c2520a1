"""A run folder that an earlier ftlaunch left when it was stopped in the middle of its first stage can be gone on with.

`old_run/` holds the folder with the model and the rows that it names. @PLACE@ stands for where they were.
"""

import shutil
from pathlib import Path

import pytest
from tests.faults.ranks import Ranks

from ftlaunch.backend import backends, runs
from ftlaunch.backend.folders import write_files
from ftlaunch.cli import text
from ftlaunch.run import changes, outputs
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import RunDir
from ftlaunch.watch import logs
from ftlaunch.watch.status import read_status

KEPT = Path(__file__).parent / "old_run"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    place = shutil.copytree(KEPT, tmp_path / "place", symlinks=True)
    for path in place.rglob("*"):
        if path.suffix in {".json", ".toml", ".yaml"}:
            path.write_text(path.read_text().replace("@PLACE@", str(place)))
    return RunDir(place / "run")


def test_it_is_shown(run: RunDir) -> None:
    status = read_status(run)
    assert [(stage.name, stage.state) for stage in status.stages] == [("01-sft", "stopped"), ("02-merge", "waiting")]
    first = status.stages[0]
    assert (first.attempts, first.step, first.steps) == (1, 4, 30)
    assert first.checkpoint == str(run.path / "01-sft/checkpoints/step-00000004")
    assert "4/30" in text.run_status(status)
    assert backends.of(run).is_over(run)
    assert any("Loading weights" in line for line in logs.read(run, None, None, None))


def test_it_is_resumed_and_merged(run: RunDir, ranks: Ranks) -> None:
    changes.require_unchanged(run)
    for planned in runs.read_plan(run).stages:
        stage_dir = run.stage_dir(planned.name)
        before = stage_dir.step.read_bytes()
        write_files(run, planned)
        assert stage_dir.step.read_bytes() == before
        stage_dir.stop.unlink(missing_ok=True)
        ranks.run(stage_dir)
    metrics = [*read_jsonl(run.stage_dir("01-sft").metrics)]
    assert [line["step"] for line in metrics if "loss" in line] == [*range(1, 31)]
    assert metrics[:4] == [*read_jsonl(KEPT / "run/01-sft/metrics.jsonl")]
    assert [stage.attempts for stage in read_status(run).stages] == [2, 1]
    assert read_status(run).state == "done"
    assert (run.stage_dir("02-merge").model / "model.safetensors").exists()
    assert "merged model: " in outputs.describe(run)
