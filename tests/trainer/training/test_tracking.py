"""Trackers: every step once in TensorBoard's own reader, over kills and resumes, and what others are sent again."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.trainer.in_process import make_data, make_step, train

from ftlaunch.errors import UserError
from ftlaunch.recipe.track import Track
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir
from ftlaunch.run.spec import StageSpec
from fttrain.training import tracking
from fttrain.training.tracking import Trackers, named, require_installed


@pytest.fixture
def spec(tiny_model: Path, rows_file: Path) -> StageSpec:
    made = make_step(tiny_model, make_data(rows_file, test=8), evaluate_every=3)
    return msgspec.structs.replace(made, track=Track(to=["tensorboard"]))


def scalars(folder: StageDir) -> dict[str, list[tuple[int, float]]]:
    """Everything that TensorBoard shows of a stage: by name, each step with its value."""
    reader = EventAccumulator(str(folder.path.parent / "track" / "tensorboard" / folder.name))
    reader.Reload()
    return {tag: [(one.step, one.value) for one in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def lines(folder: StageDir, key: str) -> list[tuple[int, float]]:
    return [(line["step"], pytest.approx(line[key])) for line in read_jsonl(folder.metrics) if key in line]


def test_a_run_that_was_killed_and_resumed_has_each_step_once(spec: StageSpec, tmp_path: Path) -> None:
    folder = train(spec, tmp_path)
    whole = scalars(folder)
    assert whole["train/loss"] == lines(folder, "loss")
    assert whole["eval/loss"] == lines(folder, "eval/loss")
    assert [at for at, _ in whole["train/grad_norm"]] == [1, 2, 3, 4, 5, 6]

    # As after a kill between the saves of step 2 and 4: two steps are there that are taken again.
    folder.result.unlink()
    for checkpoint in ("step-00000004", "step-00000006"):
        shutil.rmtree(folder.checkpoints / checkpoint)
    again = train(spec, tmp_path)
    assert scalars(again)["train/loss"] == whole["train/loss"]
    assert scalars(again)["eval/loss"] == whole["eval/loss"]


def test_what_never_reached_the_disk_is_written_when_the_stage_goes_on(spec: StageSpec, tmp_path: Path) -> None:
    folder = train(spec, tmp_path)
    shutil.rmtree(tmp_path / "track")
    folder.result.unlink()
    shutil.rmtree(folder.checkpoints / "step-00000006")
    train(spec, tmp_path)
    assert [at for at, _ in scalars(folder)["train/loss"]] == [1, 2, 3, 4, 5, 6]


class Remembering:
    """A tracker that keeps what it is given, as those on a server do."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, float]]] = []
        self.fails_at: int | None = None

    def log(self, values: dict[str, float], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("the network is gone")
        self.told.append((step, values))

    def finish(self) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Remembering:
    tracker = Remembering()
    monkeypatch.setattr(tracking, "_open", lambda *_: tracker)
    return tracker


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "steps": 9, "loss": 1.0 / step, "time": 1.0, **more}


def write(folder: StageDir, *every: dict[str, Any]) -> None:
    folder.path.mkdir(exist_ok=True, parents=True)
    folder.metrics.write_text("".join(json.dumps(one) + "\n" for one in every))


def test_a_server_is_sent_no_step_twice_and_none_is_missing(
    spec: StageSpec, tmp_path: Path, server: Remembering
) -> None:
    wanted = msgspec.structs.replace(spec, track=Track(to=["wandb"]))
    folder = StageDir(tmp_path / "01-sft")
    write(folder)
    first = Trackers(wanted, folder, is_main=True)
    for at in (1, 2, 3):
        first.log(line(at))
    first.log({"step": 3, "eval/loss": 0.5, "time": 1.0})
    known = json.loads(folder.tracked.read_text())["wandb"]
    assert known["last"] == [3, True]

    # Killed; training goes on from step 1, and metrics.jsonl was cut there. Steps 2 and 3 are taken again.
    write(folder, line(1))
    second = Trackers(wanted, folder, is_main=True)
    for at in (2, 3):
        second.log(line(at))
    second.log({"step": 3, "eval/loss": 0.5, "time": 1.0})
    second.log(line(4))
    # And what it was not sent though it is in metrics.jsonl is sent when the stage starts again.
    write(folder, *(line(at) for at in (1, 2, 3, 4, 5)))
    Trackers(wanted, folder, is_main=True)
    told = [(at, "train/loss" in values) for at, values in server.told]
    assert told == [(1, True), (2, True), (3, True), (3, False), (4, True), (5, True)]
    assert json.loads(folder.tracked.read_text())["wandb"]["id"] == known["id"]


def test_a_tracker_that_fails_does_not_end_the_run(
    spec: StageSpec, tmp_path: Path, server: Remembering, caplog: pytest.LogCaptureFixture
) -> None:
    folder = StageDir(tmp_path / "01-sft")
    write(folder)
    server.fails_at = 2
    trackers = Trackers(spec, folder, is_main=True)
    for at in (1, 2, 3):
        trackers.log(line(at))
    assert [at for at, _ in server.told] == [1]
    assert "tensorboard is left out from step 2 on: the network is gone" in caplog.text


def test_other_ranks_and_runs_without_trackers_open_none(spec: StageSpec, tmp_path: Path) -> None:
    for wanted, is_main in ((spec, False), (msgspec.structs.replace(spec, track=Track()), True)):
        Trackers(wanted, StageDir(tmp_path / "01-sft"), is_main=is_main).log(line(1))
    assert not list(tmp_path.rglob("*"))


def test_metrics_have_the_names_of_the_field() -> None:
    found = named(
        line(2, **{"rewards/margin": 0.5, "rewards/accuracy": 1, "eval/rewards/margin": 0.25, "skipped": None})
    )
    assert found == {
        "train/loss": 0.5,
        "train/rewards/margins": 0.5,
        "train/rewards/accuracies": 1,
        "eval/rewards/margins": 0.25,
    }


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="comet_ml is not installed") as caught:
        require_installed(Track(to=["comet"]))
    assert caught.value.remedy == "pip install comet_ml"


def test_a_tracker_that_cannot_start_is_a_users_error(
    spec: StageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(tracking, "_open", refuse)
    with pytest.raises(UserError, match="tensorboard cannot be started: no API key"):
        Trackers(spec, StageDir(tmp_path / "01-sft"), is_main=True)
