"""A chain with two adapters: the second begins on a merge of the first, and is merged in its turn."""

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast
from unittest import mock

import pytest
import torch
from tests.trainer.in_process import ALONE, StopAfter, start_afresh
from transformers import AutoModelForCausalLM

from ftlaunch import rules
from ftlaunch.backend.folders import write_files
from ftlaunch.plan.plan import make_plan
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
        start_afresh()
        kind = planned.spec.stage.__struct_config__.tag
        stop = cast("StopRequest", StopAfter(None))
        with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(tmp_path / "cache")):
            importlib.import_module(f"fttrain.stages.{kind}").run(
                planned.spec, made.stage_dir(planned.name), ALONE, stop
            )
    return made


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
