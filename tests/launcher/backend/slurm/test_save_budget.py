"""A stage whose steps take longer than the time it has to save is not submitted."""

import json
import os
from pathlib import Path

import pytest
from tests.launcher.scripted_runs import make_plan, write_run

from ftlaunch.backend.slurm import request
from ftlaunch.cluster.profiles import load_cluster
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import UserError
from ftlaunch.run.layout import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Two attempts: steps at 100, 101 and 141 s, and at 1000 and 1001 s."""
    run = write_run(tmp_path / "r", "train")
    stage_dir = run.stage_dir("01-sft")
    for began in (90, 990):
        process = stage_dir.new_attempt().process
        process.touch()
        os.utime(process, (began, began))
    lines = [json.dumps({"step": number, "time": time}) for number, time in enumerate((100, 101, 141, 1000, 1001))]
    stage_dir.metrics.write_text("\n".join(lines) + "\n")
    return run


def test_the_time_between_two_attempts_is_no_step(run: RunDir) -> None:
    assert request.longest_step(run.stage_dir("01-sft")) == 40


def test_a_step_longer_than_the_lead_is_refused_until_the_stage_is_done(run: RunDir, tmp_path: Path) -> None:
    plan = make_plan(run.path, "train")
    request.require_time_to_save(run, plan, Cluster(signal_lead=41))
    with pytest.raises(UserError, match="01-sft: a step and a save have taken 40 s, and signal_lead is 39 s") as told:
        request.require_time_to_save(run, plan, Cluster(signal_lead=39))
    # The line that it gives is a whole profile.
    (tmp_path / "new.toml").write_text(told.value.remedy.removeprefix("write ").split(" into ")[0])
    request.require_time_to_save(run, plan, load_cluster(str(tmp_path / "new.toml")))
    run.stage_dir("01-sft").result.touch()
    request.require_time_to_save(run, plan, Cluster(signal_lead=39))


def test_the_plan_says_how_long_a_step_has_taken(run: RunDir) -> None:
    plan = make_plan(run.path, "train")
    assert "have taken 40 s of so far" in request._saving(plan, plan.stages[0], Cluster())
