"""Runs whose processes are scripted by scripted_trainer.py."""

import sys
from pathlib import Path
from unittest.mock import patch

import msgspec

from ftlaunch.backend import backends
from ftlaunch.backend.prepare import prepare
from ftlaunch.plan.plan import Plan, PlannedStage
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.recipe.stages import Merge, Optimizer, Parallel
from ftlaunch.run.layout import RunDir
from ftlaunch.run.spec import StageSpec

SCRIPTED_TRAINER = Path(__file__).with_name("scripted_trainer.py")


class Text(msgspec.Struct):
    """As much of a loaded recipe as is written down."""

    source: Path
    text: str = "# a recipe\n"
    is_for_here: bool = False


def make_plan(run_dir: Path, *acts: str, seed: int = 1) -> Plan:
    """A plan with one stage an act: 01-sft, 02-sft, … The recipe only serves to tell one plan from another."""
    recipe = Recipe(name=run_dir.name, model=Model(path="m"), stage=[Merge()] * len(acts), seed=seed)
    stages = [_planned(recipe, f"{index:02d}-sft", act) for index, act in enumerate(acts, start=1)]
    return Plan(name=recipe.name, run_dir=str(run_dir), recipe=recipe, stages=stages)


def _planned(recipe: Recipe, name: str, act: str) -> PlannedStage:
    spec = StageSpec(
        name=recipe.name,
        stage=Merge(),
        model=recipe.model,
        adapter=recipe.adapter,
        optimizer=Optimizer(),
        parallel=Parallel(),
        data={},
        seed=recipe.seed,
        deterministic=False,
        world_size=2,
        training_hash=f"of seed {recipe.seed}",
    )
    command = [sys.executable, "-S", str(SCRIPTED_TRAINER), name, act]
    files = {"step.json": msgspec.json.encode(spec).decode()}
    return PlannedStage(name=name, spec=spec, files=files, command=command, env={"ACT": act}, notes={})


def write_run(run_dir: Path, *acts: str) -> RunDir:
    """A written run, ready to be driven."""
    # Two calls of git and nine packages' metadata, for a file that no test of scripted runs reads.
    with patch("ftlaunch.run.provenance.collect", return_value={}):
        return prepare(make_plan(run_dir, *acts), Text(run_dir.parent / "recipe.toml"), backends.on(None))
