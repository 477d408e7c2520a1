"""A run on its way takes another number of processes, and refuses what would change what it learns."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlaunch import rules
from ftlaunch.backend import backends, runs
from ftlaunch.backend.folders import write_files
from ftlaunch.backend.prepare import prepare
from ftlaunch.backend.replan import replan, save_plan
from ftlaunch.errors import RecipeError, UserError
from ftlaunch.plan.plan import make_plan
from ftlaunch.processes import lock
from ftlaunch.run.layout import RunDir

RECIPE = """
name = "tiny"
[model]
path = "./model"
[adapter]
kind = "lora"
[data.rows]
path = "rows.jsonl"
format = "text"
[[stage]]
kind = "sft"
data = "rows"
batch_size = 12
[[stage]]
kind = "merge"
[parallel]
strategy = "zero3"
procs_per_node = 2
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., RunDir]:
    """Writes the run of the recipe, or finds it where it is, as `ftlaunch run` does."""
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n')
    (tmp_path / "tiny.toml").write_text(RECIPE)

    def act(*settings: str) -> RunDir:
        loaded = rules.load_and_check(tmp_path / "tiny.toml", settings)
        return prepare(make_plan(loaded.recipe, tmp_path / "run"), loaded, backends.on(None))

    return act


def test_a_stage_gets_other_processes(write: Callable[..., RunDir]) -> None:
    run = write()
    before = json.loads(run.stage_dir("01-sft").step.read_text())
    save_plan(run, replan(run, ["parallel.procs_per_node=3", "parallel.strategy=ddp", "stage.sft.save_every=7"]))
    planned = runs.read_plan(run).stages[0]
    write_files(run, planned)
    after = run.stage_dir("01-sft").read_spec()
    assert (after.world_size, after.micro_batch_size, after.accumulation) == (3, 4, 1)
    assert after.training_hash == before["training_hash"]
    assert not run.stage_dir("01-sft").deepspeed.exists()
    assert "num_processes: 3" in run.stage_dir("01-sft").accelerate.read_text()
    assert json.loads(run.resolved.read_text())["stage"][0]["save_every"] == 7


def test_changes_add_up(write: Callable[..., RunDir]) -> None:
    run = write()
    save_plan(run, replan(run, ["stage.sft.micro_batch_size=1"]))
    save_plan(run, replan(run, ["parallel.procs_per_node=4"]))
    spec = runs.read_plan(run).stages[0].spec
    assert (spec.micro_batch_size, spec.accumulation, spec.world_size) == (1, 3, 4)


def test_a_finished_stage_stays_as_it_was(write: Callable[..., RunDir]) -> None:
    run = write()
    before = runs.read_plan(run)
    run.stage_dir("01-sft").result.write_text("{}")
    after = replan(run, ["parallel.procs_per_node=1", "parallel.strategy=single"])
    assert after.stages[0] == before.stages[0]


@pytest.mark.parametrize(
    "setting", ["stage.sft.learning_rate=1e-3", "seed=1", "stage.sft.batch_size=24", "adapter.rank=4"]
)
def test_what_a_stage_learns_cannot_change_once_it_has_begun(setting: str, write: Callable[..., RunDir]) -> None:
    run = write()
    replan(run, [setting])
    run.stage_dir("01-sft").new_attempt()
    before = run.plan.read_bytes()
    with pytest.raises(UserError, match="would change what 01-sft learns") as caught:
        replan(run, [setting])
    assert "micro_batch_size" in caught.value.remedy
    assert run.plan.read_bytes() == before


@pytest.mark.parametrize("setting", ["parallel.procs_per_node=5", "parallel.strategy=single", "parallel.proc=1"])
def test_what_does_not_fit_is_judged_as_ever(setting: str, write: Callable[..., RunDir]) -> None:
    run = write()
    with pytest.raises(RecipeError) as caught:
        replan(run, [setting])
    assert caught.value.problems


def test_a_merge_that_has_begun_may_be_allowed_to_differ_more(write: Callable[..., RunDir]) -> None:
    run = write()
    run.stage_dir("02-merge").new_attempt()
    merge = replan(run, ["stage.1.max_kl=0.05"]).stages[1].spec
    assert merge.stage.max_kl == 0.05
    with pytest.raises(UserError, match="would change what 02-merge learns"):
        replan(run, ["stage.1.dtype=fp32"])


def test_a_running_run_is_left_alone(write: Callable[..., RunDir]) -> None:
    run = write()
    plan = replan(run, ["parallel.procs_per_node=4"])
    held = lock.take(run)
    with pytest.raises(UserError, match="already running"):
        save_plan(run, plan)
    lock.release(held)


def test_the_same_training_is_the_same_run(write: Callable[..., RunDir]) -> None:
    run = write()
    for name in ("01-sft", "02-merge"):
        run.stage_dir(name).result.write_text("{}")
    assert write("parallel.procs_per_node=4").path == run.path
    with pytest.raises(UserError, match="another recipe") as caught:
        write("seed=1")
    assert "--from" not in caught.value.remedy
    with pytest.raises(UserError, match="another recipe") as caught:
        write("stage.merge.dtype=fp32")
    assert "keep 01-sft and rerun with --from 02-merge" in caught.value.remedy
