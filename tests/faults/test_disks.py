"""Disks that are full, read-only, slow or gone while training goes on: the cause is told, and nothing good is lost."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.faults.disks import Disk, mounted
from tests.trainer.in_process import make_data, make_step, train

from ftlaunch.errors import BAD_INPUT, UserError
from ftlaunch.processes import lock
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import RunDir
from ftlaunch.run.spec import StageSpec
from fttrain.checkpoint import store
from fttrain.checkpoint.manifest import newest_first, verify

NO_SPACE = "No space left on device"


@pytest.fixture
def spec(tiny_model: Path, rows_file: Path) -> Callable[..., StageSpec]:
    return lambda **stage: make_step(tiny_model, make_data(rows_file), steps=8, **stage)


def fill(disk: Disk) -> Path:
    """Leave next to no room on a disk; the file that takes it."""
    ballast = disk.path / "ballast"
    with ballast.open("wb") as file:
        free = os.statvfs(disk.path)
        file.write(bytes(max(0, free.f_bavail * free.f_bsize - 40_000)))
    return ballast


@pytest.fixture
def on_warning(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Has something happen when training first warns of a save."""

    def act(do: Callable[[], None]) -> None:
        warn = store.Checkpoints._warn

        def warned(self: store.Checkpoints, message: str) -> None:
            warn(self, message)
            monkeypatch.setattr(store.Checkpoints, "_warn", warn)
            do()

        monkeypatch.setattr(store.Checkpoints, "_warn", warned)

    return act


@pytest.mark.parametrize("policy", ["go-on", "wait"])
def test_training_outlives_a_full_disk(
    policy: str,
    spec: Callable[..., StageSpec],
    tmp_path: Path,
    on_warning: Callable[[Callable[[], None]], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(store, "RETRY_SECONDS", 0.1)
    with mounted(tmp_path / "disk", kilobytes=8000) as disk:
        (disk.path / "cache").symlink_to(tmp_path)
        ballast = fill(disk)
        told: list[dict[str, Any]] = []
        on_warning(ballast.unlink)
        monkeypatch.setattr(store, "write_json", lambda _, said: told.append(msgspec.to_builtins(said)))
        step = train(spec(on_save_failure=policy, keep=9), disk.path)
        assert {one["step"] for one in told} == {2}
        assert NO_SPACE in told[0]["cause"]
        assert not step.save_failure.exists()
        names = [path.name for path in reversed(newest_first(step.checkpoints))]
        assert all(verify(path) is None for path in newest_first(step.checkpoints))
        assert [line["step"] for line in read_jsonl(step.metrics)] == list(range(1, 9))
    assert f"step 2 could not be written: rank 0: {NO_SPACE}" in caplog.text
    missed = ["step-00000002"] if policy == "go-on" else []
    assert [*missed, *names] == [f"step-0000000{number}" for number in (2, 4, 6, 8)]


def test_training_stops_at_a_full_disk_where_it_is_told_to(spec: Callable[..., StageSpec], tmp_path: Path):
    with mounted(tmp_path / "disk", kilobytes=8000) as disk:
        (disk.path / "cache").symlink_to(tmp_path)
        fill(disk)
        with pytest.raises(UserError, match=NO_SPACE):
            train(spec(on_save_failure="stop"), disk.path)
        assert not list((disk.path / "01-sft" / "checkpoints").iterdir())


def test_the_last_save_counts_whatever_the_policy(
    spec: Callable[..., StageSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with mounted(tmp_path / "disk", kilobytes=8000) as disk:
        (disk.path / "cache").symlink_to(tmp_path)
        save = store.Checkpoints.save

        def save_on_a_disk_that_fails(self: store.Checkpoints, step: int, *arguments: Any, **named: Any) -> None:
            if step == 8:
                self._wait(None)
                disk.make_readonly()
            save(self, step, *arguments, **named)

        monkeypatch.setattr(store.Checkpoints, "save", save_on_a_disk_that_fails)
        with pytest.raises(UserError, match="step 8 could not be written: rank 0: Read-only file system"):
            train(spec(on_save_failure="go-on", save_every=4), disk.path)
        assert verify(disk.path / "01-sft" / "checkpoints" / "step-00000004") is None
        with pytest.raises(UserError, match="cannot be written: Read-only file system"):
            train(spec(on_save_failure="go-on", save_every=4), disk.path)


def test_a_run_on_a_readonly_disk_is_not_resumed(tmp_path: Path):
    with mounted(tmp_path / "disk", kilobytes=100) as disk:
        disk.make_readonly()
        with pytest.raises(UserError, match="cannot be written: Read-only file system"):
            lock.take(RunDir(disk.path))


def test_a_slow_save_is_waited_for_once_and_the_next_passed_over(
    spec: Callable[..., StageSpec],
    tmp_path: Path,
    count_calls: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(store, "PATIENCE_SECONDS", 0.05)
    count_calls(tmp_path / "01-sft" / "checkpoints", at=3, do="slow")
    step = train(spec(keep=9), tmp_path)
    names = [path.name for path in reversed(newest_first(step.checkpoints))]
    assert names[0] == "step-00000002"
    assert names[-1] == "step-00000008"
    assert len(names) < 4
    assert "step 4 is not saved: the checkpoint of step 2 is still being written" in caplog.text


def test_a_run_whose_folder_is_removed_ends_and_says_so(load_path: Callable[..., Path], tmp_path: Path):
    run = RunDir(tmp_path / "run")
    settings = ["--set", "stage.sft.steps=4000", "--run-dir", str(run.path)]
    command = [sys.executable, "-m", "ftlaunch", "run", str(load_path()), *settings]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = run.stage_dir("01-sft").metrics
    while not metrics.exists() or metrics.stat().st_size < 100:
        assert process.poll() is None
        time.sleep(0.05)
    while run.path.exists():  # until nothing is written while it is removed
        shutil.rmtree(run.path, ignore_errors=True)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == BAD_INPUT, said
    assert f"{run.path / '01-sft'} is gone" in said
    assert "Traceback" not in said
