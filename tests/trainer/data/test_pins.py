"""A run goes on with the commits of the hub that it began with, until it is told to take what is there now."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from msgspec.structs import replace
from tests.trainer.hub_cache import NEW, OLD, keep, without_network
from tests.trainer.in_process import ALONE

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import Full
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.stages import Optimizer, Parallel, Ppo, Sft
from ftlaunch.run.changes import accept
from ftlaunch.run.layout import RunDir
from ftlaunch.run.spec import StageSpec
from fttrain.data import pins
from fttrain.data.sources import load_rows


def at(spec: StageSpec) -> list[str | None]:
    return [spec.model.revision, *(data.revision for data in spec.data.values())]


@pytest.fixture
def spec() -> StageSpec:
    return StageSpec(
        **{"name": "r", "stage": Sft(data="rows"), "model": Model(path="owner/model"), "adapter": Full()},
        **{"optimizer": Optimizer(), "parallel": Parallel(), "seed": 0, "deterministic": True, "world_size": 1},
        data={"rows": Data(path="owner/rows", format="text"), "own": Data(path="/own.jsonl")},
        training_hash="",
    )


def test_a_run_keeps_its_commits(spec: StageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_network(monkeypatch, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    run = RunDir(tmp_path / "run")
    run.path.mkdir()

    def push(commit: str, text: str) -> None:
        keep(tmp_path, commit, [{"text": text}])
        for name in ("model", "judge"):
            repository = tmp_path / f"hub/models--owner--{name}"
            (repository / "snapshots" / commit).mkdir(parents=True)
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs/main").write_text(commit)
        without_network(monkeypatch, tmp_path)

    def judged_by(model: str) -> Ppo:
        settled = pins.settle(replace(spec, stage=Ppo(data="rows", reward_model=model)), run.commits, ALONE).stage
        assert isinstance(settled, Ppo)
        return settled

    push(OLD, "old")
    assert at(pins.settle(spec, run.commits, ALONE)) == [OLD, OLD, None]
    assert judged_by("owner/judge").reward_revision == OLD
    push(NEW, "new")
    assert judged_by("owner/judge").reward_revision == OLD
    assert judged_by("/here").reward_revision is None
    again = pins.settle(spec, run.commits, ALONE)
    assert at(again) == [OLD, OLD, None]
    assert [row for _, row in load_rows(again.data["rows"])] == [{"text": "old"}]
    assert list(json.loads(run.commits.read_text())) == [
        *("data owner/rows main", "model owner/model main", "model owner/judge main"),
    ]
    nobody: Any = replace(spec, model=Model(path="nobody/model"))
    with pytest.raises(UserError, match="the model nobody/model cannot be had"):
        pins.settle(nobody, run.commits, ALONE)
    told = accept(run)
    assert told[0] == f"data owner/rows main is no longer kept at commit {OLD}"
    assert at(pins.settle(spec, run.commits, ALONE)) == [NEW, NEW, None]
