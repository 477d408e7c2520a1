"""Every recipe that ships is judged and planned."""

from pathlib import Path

import pytest

from ftlaunch.plan.plan import make_plan
from ftlaunch.recipe.adapter import Full, Virtual
from ftlaunch.rules import load_and_check

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_loads_and_plans(path: Path, tmp_path: Path):
    loaded = load_and_check(path)
    assert loaded.recipe.name == path.stem.replace("_", "-")
    plan = make_plan(loaded.recipe, tmp_path)
    assert plan.stages[0].name == f"01-{plan.stages[0].spec.stage.__struct_config__.tag}"
    left_as_it_is = isinstance(loaded.recipe.adapter, Full | Virtual) or loaded.recipe.sweep
    assert plan.stages[-1].name.endswith("-merge") or left_as_it_is
    for planned in plan.stages:
        assert planned.command[:2] == ["accelerate", "launch"]
        assert ("deepspeed.json" in planned.files) == bool(planned.spec.parallel.zero_stage)
