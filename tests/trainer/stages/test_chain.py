"""A chain with two adapters: the second begins on a merge of the first, and is merged in its turn."""

import importlib
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from tests.trainer.in_process import ALONE, StopAfter, start_afresh
from transformers import AutoModelForCausalLM

from ftlaunch import rules
from ftlaunch.backend import backends
from ftlaunch.backend.folders import write_files
from ftlaunch.backend.prepare import prepare
from ftlaunch.backend.replan import replan
from ftlaunch.errors import UserError
from ftlaunch.plan.plan import PlannedStage, make_plan
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import RunDir
from fttrain.distributed.stop_request import StopRequest

SECOND = """
[[stage]]
kind = "sft"
data = "rows"
steps = 3
batch_size = 8
learning_rate = 1e-2
adapter = {kind = "lora", rank = 2, alpha = 4}
[[stage]]
kind = "merge"
"""


@pytest.fixture
def run(recipe: Callable[..., Path], tmp_path: Path) -> RunDir:
    """Every stage of the recipe, run in this process."""
    path = recipe()
    path.write_text(path.read_text() + SECOND)
    plan = make_plan(rules.load_and_check(path).recipe, tmp_path / "run")
    made = RunDir(tmp_path / "run")
    made.path.mkdir()
    for planned in plan.stages:
        write_files(made, planned)
        run_here(made, planned)
    return made


def run_here(run: RunDir, planned: PlannedStage) -> Any:
    """What the stage returns, run in this process."""
    start_afresh()
    kind = planned.spec.stage.__struct_config__.tag
    stop = cast("StopRequest", StopAfter(None))
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(run.path / "cache")):
        module = importlib.import_module(f"fttrain.stages.{kind}")
        return module.run(planned.spec, run.stage_dir(planned.name), ALONE, stop)


def test_a_merge_that_fails_its_check_costs_no_training_and_names_a_command_that_works(
    recipe: Callable[..., Path], tmp_path: Path
):
    path = recipe()
    path.write_text(path.read_text() + '[[stage]]\nkind = "merge"\nmax_kl = 1e-300\n')
    loaded = rules.load_and_check(path)
    plan = make_plan(loaded.recipe, tmp_path / "the run")
    run = prepare(plan, loaded, backends.on(None))
    sft, merge = plan.stages
    write_json(run.stage_dir(sft.name).result, run_here(run, sft))
    with pytest.raises(UserError, match="max_kl is 1e-300") as failed:
        run_here(run, merge)
    remedy = str(failed.value.remedy)
    artifact = run.stage_dir(sft.name).artifact
    assert f"the training is whole, its artifact works as it is: ftlaunch chat '{artifact}'" in remedy
    # What the command does, without the seconds of a start: it plans the run with the setting, and runs what is left.
    *verb, folder, option, setting = shlex.split(remedy.rpartition("to accept it: ")[2])
    assert (verb, folder, option) == (["ftlaunch", "resume"], str(run.path), "--set")
    run_here(run, replan(run, [setting]).stages[1])
    assert (run.stage_dir(merge.name).model / "model.safetensors").exists()


def test_another_adapter_begins_on_a_merge_of_the_first(run: RunDir):
    assert [stage_dir.name for stage_dir in run.stage_dirs()] == ["01-sft", "02-merge", "03-sft", "04-merge"]
    second = run.stage_dir("03-sft")
    assert second.read_spec().start == "02-merge/model"
    card = json.loads((second.artifact / "artifact.json").read_text())
    assert card["base"]["path"] == str(run.stage_dir("02-merge").model)
    assert json.loads((second.artifact / "adapter_config.json").read_text())["r"] == 2
    first, last = (
        AutoModelForCausalLM.from_pretrained(run.stage_dir(name).model).state_dict()
        for name in ("02-merge", "04-merge")
    )
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed
    assert all("proj" in name for name in changed)
