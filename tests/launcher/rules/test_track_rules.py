"""What [track] may say, and where it goes: into step.json, and into no hash."""

from pathlib import Path

import pytest

from ftlaunch.errors import RecipeError
from ftlaunch.load import load_recipe
from ftlaunch.plan.plan import make_plan
from ftlaunch.recipe.track import Track
from ftlaunch.rules import find_problems

RECIPE = """\
name = "demo"
model.path = "owner/model"
[data.qa]
path = "owner/rows"
prompt = "{question}"
completion = "{answer}"
[[stage]]
kind = "sft"
data = "qa"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_trackers_reach_the_trainer_and_change_nothing_that_is_learnt(recipe: Path, tmp_path: Path) -> None:
    settings = ['track.to=["tensorboard", "wandb"]', "track.project=p", "track.offline=true"]
    plain, tracked = (make_plan(load_recipe(recipe, one).recipe, tmp_path) for one in ([], settings))
    assert find_problems(load_recipe(recipe, settings)) == []
    assert plain.stages[0].spec.track == Track()
    assert tracked.stages[0].spec.track == Track(to=["tensorboard", "wandb"], project="p", offline=True)
    assert plain.stages[0].spec.training_hash == tracked.stages[0].spec.training_hash


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (['track.to=["wandb", "wandb"]'], "track.to"),
        (["track.project=p"], "track.project"),
        (['track.to=["tensorboard"]', "track.offline=true"], "track.offline"),
    ],
)
def test_what_would_do_nothing_is_refused(recipe: Path, settings: list[str], key: str) -> None:
    (problem,) = find_problems(load_recipe(recipe, settings))
    assert problem.key == key


@pytest.mark.parametrize("name", ["tensorbord", "neptune"])
def test_a_tracker_that_nobody_knows_is_refused(recipe: Path, name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, [f'track.to=["{name}"]'])
    assert caught.value.problems[0].key.startswith("track.to")


def test_no_key_takes_a_secret(recipe: Path) -> None:
    found = find_problems(load_recipe(recipe, ['track.to=["wandb"]', "track.project=wandb_v1_" + "a1B2" * 8]))
    assert any("secret" in problem.message for problem in found)
