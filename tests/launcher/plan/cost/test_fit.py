"""What would not fit first, and the ways out: each one, when it is followed, makes the plan fit."""

import itertools
import re
from pathlib import Path

import pytest

from ftlaunch import rules
from ftlaunch.plan.cost import costs, words
from ftlaunch.plan.cost.costs import Cost
from ftlaunch.plan.cost.devices import Device
from ftlaunch.plan.cost.fit import WayOut
from ftlaunch.plan.plan import make_plan
from ftlaunch.recipe.recipe import Recipe

GB = 10**9
RECIPE = """
name = "fit"
[model]
path = "{model}"
dtype = "{dtype}"
[adapter]
kind = "{adapter}"
[data.rows]
path = "owner/rows"
{form}
max_length = 2048
[[stage]]
kind = "{stage}"
data = "rows"
steps = 500
batch_size = 16
{more}
[parallel]
strategy = "{strategy}"
procs_per_node = {processes}
"""
BIG, SMALL = "meta-llama/Meta-Llama-3-70B", "meta-llama/Meta-Llama-3-8B"
CARDS = (Device("A10", True, 24 * GB, 64 * GB), Device("A100", True, 80 * GB, 128 * GB), Device("CPU", False, 32 * GB))
WORLDS = (("single", 1), ("ddp", 4), ("zero2", 8))
Case = tuple[str, str, tuple[str, int], str]
ALL_CASES: list[Case] = [
    *itertools.product((SMALL, BIG), ("lora", "dora", "full"), WORLDS, ("sft", "dpo", "ppo")),
    *itertools.product((SMALL, BIG), ("pissa", "adalora", "prompt", "prefix"), WORLDS, ("sft",)),
]
CASES = ALL_CASES[::4]
"""A sample: each takes some tens of milliseconds."""


def write(folder: Path, device: Device, case: Case) -> Path:
    model, adapter, (strategy, processes), stage = case
    path = folder / "recipe.toml"
    (folder / "rewards.py").write_text("def length(prompt, answer, row):\n    return 0.0\n")
    values = {"model": model, "adapter": adapter, "strategy": strategy, "processes": processes, "stage": stage}
    values["dtype"] = "bf16" if device.cuda else "fp32"
    values["form"] = 'format = "preference"' if stage == "dpo" else 'prompt = "{q}"\ncompletion = "{a}"'
    more = {"ppo": 'reward_function = "rewards.py:length"', "sft": f"packing = {str(adapter[0] != 'p').lower()}"}
    values["more"] = more.get(stage, "")
    path.write_text(RECIPE.format(**values))
    return path


def planned(recipe: Recipe, folder: Path, device: Device) -> Cost:
    found = costs.of_spec(make_plan(recipe, folder).stages[0].spec, device, 2 if device.cuda else 4)
    assert isinstance(found, Cost)
    return found


def followed(way: WayOut, recipe: Recipe) -> list[str]:
    """The settings that a way out says, as `--set` takes them."""
    of_stage, of_data = recipe.stage[0].__struct_fields__, "max_length"
    settings: list[str] = []
    for key, value in re.findall(r'([\w.]+) = ("[^"]*"|\S+)', way.words):
        if key == of_data:
            settings += [f"data.{name}.{key}={value}" for name in recipe.data]
        else:
            own = key.removeprefix("stage.")
            settings.append(f"stage.0.{own}={value}" if own != key or key in of_stage else f"{key}={value}")
    return settings


@pytest.mark.parametrize("device", CARDS, ids=lambda device: device.name)
def test_each_way_out_makes_the_plan_fit_when_it_is_followed(tmp_path: Path, device: Device) -> None:
    seen = 0
    for case in CASES:
        path = write(tmp_path, device, case)
        recipe = rules.load_and_check(path, []).recipe
        misfit = planned(recipe, tmp_path, device).misfit
        for way in misfit.ways if misfit is not None else []:
            told = planned(rules.load_and_check(path, followed(way, recipe)).recipe, tmp_path, device)
            assert (told.misfit is None) == way.fits, (case, way)
            assert told.memory.needed == way.needed, (case, way)
            seen += 1
    assert seen > 10


def test_three_ways_out_are_told_where_there_are_three(tmp_path: Path) -> None:
    path = write(tmp_path, CARDS[0], (SMALL, "lora", ("single", 1), "sft"))
    told = planned(rules.load_and_check(path, []).recipe, tmp_path, CARDS[0])
    assert told.misfit is not None
    assert [way.fits for way in told.misfit.ways] == [True] * 3
    assert "does not fit: there is no room for the activations" in words.of_stage(told)


def test_no_way_out_is_told_that_the_rest_of_the_recipe_forbids(tmp_path: Path) -> None:
    """Each of these takes one of the changes away: int8 and a paged optimizer forbid ZeRO, adversarial noise also
    checkpointing; a stage's own tables are named as its own."""
    path = write(tmp_path, CARDS[0], (SMALL, "lora", ("ddp", 4), "sft"))
    own = 'stage.0.parallel={strategy="ddp", procs_per_node=4}'
    for settings in (
        ["model.quantization=int8", "data.rows.max_length=8192"],
        ["optimizer.name=paged_adamw"],
        ["noise.kind=adversarial"],
        [own, "adapter.dropout=0"],
    ):
        recipe = rules.load_and_check(path, settings).recipe
        misfit = planned(recipe, tmp_path, CARDS[0]).misfit
        assert misfit is not None, settings
        for way in misfit.ways:
            told = planned(rules.load_and_check(path, [*settings, *followed(way, recipe)]).recipe, tmp_path, CARDS[0])
            assert told.memory.needed == way.needed, (settings, way)
