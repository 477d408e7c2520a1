"""What an evaluate stage may ask for, what it starts from, and how its mistakes are told."""

from pathlib import Path

import pytest

from ftlaunch.load import load_recipe
from ftlaunch.plan.plan import make_plan
from ftlaunch.recipe.stages import Evaluate
from ftlaunch.rules import find_problems

RECIPE = """\
name = "demo"
model.path = "owner/model"
adapter.kind = "lora"
[data.qa]
path = "owner/rows"
prompt = "{question}"
completion = "{answer}"
[data.pairs]
path = "owner/pairs"
format = "preference"
[[stage]]
kind = "sft"
data = "qa"
[[stage]]
kind = "dpo"
data = "pairs"
[[stage]]
kind = "evaluate"
data = "qa"
[parallel]
strategy = "zero2"
procs_per_node = 4
device = "cpu"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_it_starts_from_the_last_training_and_its_processes_hold_whole_models(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe, [])
    assert find_problems(loaded) == []
    planned = make_plan(loaded.recipe, tmp_path / "run").stages[-1]
    assert (planned.name, planned.spec.start) == ("03-evaluate", "02-dpo/artifact")
    assert (planned.spec.parallel.strategy, planned.spec.world_size, list(planned.spec.data)) == ("ddp", 4, ["qa"])
    assert "deepspeed.json" not in planned.files
    assert planned.notes["metrics"] == "bleu, nist, rouge"
    assert "and the plain base" in planned.notes["evaluates"]


@pytest.mark.parametrize(
    ("settings", "start", "strategy", "size"),
    [
        (["stage.2.start=sft"], "01-sft/artifact", "ddp", 4),
        (["stage.2.start=base"], None, "ddp", 4),
        (["parallel.strategy=zero3"], "02-dpo/artifact", "single", 1),
        (["parallel.procs_per_node=1"], "02-dpo/artifact", "single", 1),
        (["stage.2.parallel.strategy=ddp", "stage.2.parallel.procs_per_node=2"], "02-dpo/artifact", "ddp", 2),
    ],
)
def test_start_and_processes_can_be_named(
    recipe: Path, tmp_path: Path, settings: list[str], start: str | None, strategy: str, size: int
) -> None:
    loaded = load_recipe(recipe, settings)
    assert find_problems(loaded) == []
    step = make_plan(loaded.recipe, tmp_path / "run").stages[-1].spec
    assert (step.start, step.parallel.strategy, step.world_size) == (start, strategy, size)


def test_data_may_be_there_for_the_evaluation_alone(recipe: Path) -> None:
    more = '[data.more]\npath = "o/m"\nprompt = "{a}"\ncompletion = "{b}"\n'
    recipe.write_text(RECIPE.replace("[data.pairs]", f"{more}[data.pairs]"))
    assert find_problems(load_recipe(recipe, ["stage.2.data=more"])) == []
    assert [one.key for one in find_problems(load_recipe(recipe, []))] == ["data.more"]


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        (["stage.2.data=rows"], "stage[2].data", "there is no table [data.rows]"),
        (['stage.2.metrics=["preference_accuracy"]'], "stage[2].data", "preference_accuracy has no use for rows of"),
        (["stage.2.data=pairs"], "stage[2].data", "bleu has no use for rows of format"),
        (['stage.2.metrics=["preference_accuracy", "bleu"]'], "stage[2].metrics", "needs pairs of answers"),
        (['stage.2.metrics=["bleu", "bleu"]'], "stage[2].metrics", 'names "bleu" 2 times'),
        (["data.qa.train_on=all"], "data.qa.train_on", "only last answers are compared"),
        (['stage.2.metrics=["multiple_choice"]', "stage.2.choices_field=c"], "stage[2].label_field", "is missing"),
        (["stage.2.choices_field=c"], "stage[2].choices_field", "counts only for the metric multiple_choice"),
        (["stage.2.beams=4", "stage.2.temperature=0.5"], "stage[2].beams", "temperature draws one"),
        (["stage.2.top_p=0.5"], "stage[2].top_p", "counts only where tokens are drawn"),
        (["stage.2.parallel.strategy=zero2"], "stage[2].parallel", "shares weights out"),
        (["stage.2.parallel.procs_per_node=2"], "stage[2].parallel", "is one process"),
        (["stage.2.start=ppo"], "stage[2].start", "none of the earlier training stages"),
    ],
)
def test_mistakes_are_told_by_key(recipe: Path, settings: list[str], key: str, message: str) -> None:
    (problem, *_) = find_problems(load_recipe(recipe, settings))
    assert problem.key == key
    assert message in problem.message
    assert problem.remedy


def test_a_reward_model_gives_no_answers(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.replace('kind = "dpo"', 'kind = "reward"'))
    loaded = load_recipe(recipe, [])
    assert make_plan(loaded.recipe, tmp_path / "run").stages[-1].spec.start == "01-sft/artifact"
    (problem,) = find_problems(load_recipe(recipe, ["stage.2.start=reward"]))
    assert "rates answers" in problem.message


def test_a_metric_of_ones_own_is_a_file_or_a_folder(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "shout" / "shout.py"
    module.parent.mkdir()
    module.write_text("")
    pinned = "owner/metric@" + "a1" * 20
    loaded = load_recipe(recipe, [f'stage.2.metrics=["shout", "./shout/shout.py", "cider", "{pinned}"]'])
    stage = loaded.recipe.stage[2]
    assert isinstance(stage, Evaluate)
    assert stage.metrics == [str(module), str(module), "cider", pinned]
    module.chmod(0o666)
    assert any("shout.py" in problem.message for problem in find_problems(loaded))


@pytest.mark.parametrize(
    ("metric", "message", "remedy"),
    [
        ("belu", "there is no metric", 'did you mean "bleu"?'),
        ("owner/metric", "a program of the hub that could change", "owner/name@COMMIT"),
        ("owner/metric@main", "a program of the hub that could change", "owner/name@COMMIT"),
        ("./empty", "there is no metric in", "NAME with NAME.py in it"),
    ],
)
def test_a_metric_that_cannot_be_is_refused(
    recipe: Path, tmp_path: Path, metric: str, message: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (problem,) = load_recipe(recipe, [f'stage.2.metrics=["{metric}"]']).misplaced
    assert problem.key == "stage[2].metrics[0]"
    assert message in problem.message
    assert remedy in problem.remedy
