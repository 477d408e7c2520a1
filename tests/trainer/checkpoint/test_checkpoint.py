"""Checkpoints on disk: what is wrong with one is named, and nothing that goes wrong while saving harms another."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.faults.disks import mounted
from tests.trainer.in_process import copy, make_data, make_step, train

from ftlaunch.errors import UserError
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir
from ftlaunch.run.spec import StageSpec
from fttrain.checkpoint.manifest import render, verify
from fttrain.checkpoint.shared_memory import SharedShard
from fttrain.distributed.stop_request import StoppedEarly


@pytest.fixture(scope="module")
def spec(tiny_model: Path, rows_file: Path) -> StageSpec:
    return make_step(tiny_model, make_data(rows_file), keep=3)


@pytest.fixture(scope="module")
def calm(spec: StageSpec, tmp_path_factory: pytest.TempPathFactory) -> StageDir:
    """A run that nothing happened to, with checkpoints of steps 2, 4 and 6."""
    return train(spec, tmp_path_factory.mktemp("calm"))


@pytest.fixture
def stopped(spec: StageSpec, tmp_path: Path) -> StageDir:
    """A run that was stopped after step 4 of 6, with checkpoints of steps 2 and 4."""
    with pytest.raises(StoppedEarly):
        train(spec, tmp_path, stop_after=4)
    return StageDir(tmp_path / "01-sft")


def names(stage_dir: StageDir) -> list[str]:
    return sorted(path.name for path in stage_dir.checkpoints.iterdir())


def assert_same_end(stage_dir: StageDir, calm: StageDir) -> None:
    losses, calm_losses = (
        [line["loss"] for line in read_jsonl(one.metrics) if "loss" in line] for one in (stage_dir, calm)
    )
    assert losses == calm_losses
    ours, theirs = (load_file(one.artifact / "adapter_model.safetensors") for one in (stage_dir, calm))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def cut(folder: Path) -> None:
    data = (folder / "rank0.safetensors").read_bytes()
    (folder / "rank0.safetensors").write_bytes(data[:-1])


def flip(folder: Path) -> None:
    data = bytearray((folder / "rank0.safetensors").read_bytes())
    data[-40] ^= 1
    (folder / "rank0.safetensors").write_bytes(data)


def change_manifest(folder: Path, **values: Any) -> None:
    """Write other values into a manifest, as whoever wrote the checkpoint would have: with a digest that fits."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | values
    del manifest["sha256"]
    path.write_text(render(manifest))


def miscount(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step": 4', '"step": 5', 1))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (cut, "rank0.safetensors has "),
    "a bit flipped": (flip, "rank0.safetensors does not match its SHA-256"),
    "a file gone": (lambda folder: (folder / "rank0.safetensors").unlink(), "rank0.safetensors is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (lambda folder: (folder / "manifest.json").write_text('{"format": 2, "fi'), "cannot be read"),
    "an empty manifest": (lambda folder: (folder / "manifest.json").write_bytes(b""), "cannot be read"),
    "no object": (lambda folder: (folder / "manifest.json").write_text("null"), "cannot be read"),
    "no text": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\x00"), "cannot be read"),
    "no list of files": (lambda folder: change_manifest(folder, files=["rank0.safetensors"]), "cannot be read"),
    "another step": (miscount, "manifest.json does not match its own SHA-256"),
    "another format": (lambda folder: change_manifest(folder, format=1), "format 1 is not 2"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage: str, calm: StageDir, tmp_path: Path):
    folder = Path(shutil.copytree(calm.checkpoints / "step-00000004", tmp_path / "step-00000004"))
    assert verify(folder) is None
    act, problem = DAMAGE[damage]
    act(folder)
    assert problem in (verify(folder) or "")


def test_a_full_disk_costs_the_new_checkpoint_only(spec: StageSpec, stopped: StageDir, calm: StageDir, tmp_path: Path):
    with mounted(tmp_path / "disk", kilobytes=4000) as disk:
        step = copy(stopped, disk.path)
        used = sum(path.stat().st_size for path in disk.path.rglob("*") if path.is_file())
        disk.resize(used // 1024 + 100)
        with pytest.raises(UserError, match="step 6 could not be written: rank 0: No space left on device") as caught:
            train(spec, disk.path)
        assert "ftlaunch resume" in caught.value.remedy
        assert names(step) == ["step-00000002", "step-00000004"]
        assert all(verify(path) is None for path in step.checkpoints.iterdir())
        disk.resize(8000)
        assert_same_end(train(spec, disk.path), calm)


def test_an_interrupted_save_is_ignored_and_cleared_away(spec: StageSpec, stopped: StageDir, calm: StageDir):
    partial = stopped.checkpoints / ".step-00000005.partial"
    shutil.copytree(stopped.checkpoints / "step-00000004", partial)
    assert_same_end(train(spec, stopped.path.parent), calm)
    assert names(stopped) == ["step-00000002", "step-00000004", "step-00000006"]


def test_a_bad_checkpoint_is_not_counted_among_those_kept(spec: StageSpec, tmp_path: Path):
    with pytest.raises(StoppedEarly):
        train(spec, tmp_path, stop_after=5)
    stage_dir = StageDir(tmp_path / "01-sft")
    assert names(stage_dir) == ["step-00000002", "step-00000004", "step-00000005"]
    cut(stage_dir.checkpoints / "step-00000004")
    train(spec, tmp_path)  # keeps three
    good = [name for name in names(stage_dir) if verify(stage_dir.checkpoints / name) is None]
    assert good == ["step-00000002", "step-00000005", "step-00000006"]


def test_if_every_one_is_bad_nothing_is_trained_over_them(
    spec: StageSpec, stopped: StageDir, caplog: pytest.LogCaptureFixture
):
    flip(stopped.checkpoints / "step-00000004")
    change_manifest(stopped.checkpoints / "step-00000002", format=9)
    with pytest.raises(
        UserError, match=r"step-00000004: rank0\.safetensors does not match.*step-00000002: format 9 is not 2"
    ):
        train(spec, stopped.path.parent)
    assert "checkpoint step-00000004 is passed over" in caplog.text
    assert names(stopped) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"training_hash": "of-another"}, "was written by another recipe")],
)
def test_a_foreign_checkpoint_is_refused(
    change: dict[str, Any], message: str, spec: StageSpec, calm: StageDir, tmp_path: Path
):
    step = copy(calm, tmp_path)
    change_manifest(step.checkpoints / "step-00000006", **change)
    before = names(step)
    with pytest.raises(UserError, match=message):
        train(spec, tmp_path)
    assert names(step) == before


def test_a_checkpoint_of_an_earlier_version_has_no_index_and_is_read(
    spec: StageSpec, stopped: StageDir, calm: StageDir
):
    folder = stopped.checkpoints / "step-00000004"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "pieces.json").unlink()
    change_manifest(folder, files={name: seal for name, seal in manifest["files"].items() if name != "pieces.json"})
    assert_same_end(train(spec, stopped.path.parent), calm)


@pytest.mark.parametrize("policy", ["go-on", "wait"])
def test_what_could_not_be_copied_is_never_written_from_an_older_copy(
    policy: str, tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fill, calls = SharedShard.fill, 0

    def fails_once(self: SharedShard, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError("Cannot allocate memory")
        fill(self, *arguments)

    monkeypatch.setattr(SharedShard, "fill", fails_once)
    step = train(make_step(tiny_model, make_data(rows_file), keep=3, on_save_failure=policy), tmp_path)
    assert names(step) == ["step-00000002", "step-00000006"]


def test_a_streamed_run_that_was_stopped_ends_as_a_calm_one(tiny_model: Path, rows_file: Path, tmp_path: Path):
    spec = make_step(tiny_model, make_data(rows_file, streaming=True, test=0), steps=7)
    calm = train(spec, tmp_path / "calm")
    with pytest.raises(StoppedEarly):
        train(spec, tmp_path / "stopped", stop_after=5)
    assert_same_end(train(spec, tmp_path / "stopped"), calm)
