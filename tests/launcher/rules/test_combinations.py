"""What goes together: validate speaks from the table, recipes are read as they were meant, the page is current."""

from itertools import product
from pathlib import Path

import pytest
from tests.sample_recipes import SampleRecipes, covering

from ftlaunch.errors import Problem, RecipeError
from ftlaunch.plan.resolve import resolve
from ftlaunch.recipe.stages import Training
from ftlaunch.rules import find_problems
from ftlaunch.rules.compatibility import complete, reasons, refusals
from ftlaunch.rules.compatibility.axes import AXES, describe
from ftlaunch.rules.compatibility.refusals import REFUSALS, Refusal
from ftlaunch.rules.compatibility.table import page

PAGE = Path(__file__).parents[3] / "recipes" / "COMPATIBILITY.md"


@pytest.fixture(scope="module")
def sample_recipes(tmp_path_factory: pytest.TempPathFactory) -> SampleRecipes:
    return SampleRecipes("owner/model", tmp_path_factory.mktemp("sample_recipes"))


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), (
        "it is out of date: .venv/bin/python -m ftlaunch.rules.compatibility > recipes/COMPATIBILITY.md"
    )


def test_validate_accepts_what_works_and_reads_it_as_it_was_meant(sample_recipes: SampleRecipes) -> None:
    for number, combination in enumerate(covering({}, cells=False)):
        loaded = sample_recipes.load(combination, number)
        assert find_problems(loaded) == [], combination
        stage = loaded.recipe.stage[0]
        assert isinstance(stage, Training)
        assert describe(stage, resolve(loaded.recipe)[0].tables).items() <= combination.items()


def with_one_more(values: dict[str, str]) -> dict[str, str]:
    """A combination that has these values and would work, as far as can be, but for one of them."""
    without = [{other: value for other, value in values.items() if other != axis} for axis in values]
    found = [rest | values for rest in map(complete, without) if rest]
    return min(found, key=lambda combination: len(list(refusals(combination))))


def problems(sample_recipes: SampleRecipes, combination: dict[str, str]) -> list[Problem]:
    try:
        return find_problems(sample_recipes.load(combination))
    except RecipeError as error:
        return error.problems


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: "-".join(refusal.of))
def test_validate_refuses_every_combination_of_a_refusal(refusal: Refusal, sample_recipes: SampleRecipes) -> None:
    for values in product(*refusal.of.values()):
        combination = with_one_more(dict(zip(refusal.of, values, strict=True)))
        told = problems(sample_recipes, combination)
        index = 1 if "after" in refusal.of else 0
        key = refusal.key.replace("stage", f"stage[{index}]", 1) if refusal.key.startswith("stage") else refusal.key
        ours = [problem for problem in told if problem.key == key and refusal.said(combination) in problem.message]
        assert ours, (combination, told)
        if not refusal.at_load:  # else the loader, which says what is nearest, has the remedy
            assert ours[0].remedy == refusal.remedy
            assert {problem.remedy for problem in told} <= {other.remedy for other in refusals(combination)}


def test_what_no_single_refusal_tells_has_its_reasons() -> None:
    """Virtual tokens and a shared prompt: one wants padded rows, the other packed ones."""
    values = {"method": "prompt", "share_prompt": "on"}
    assert not list(refusals(values))
    assert complete(values) is None
    assert {tuple(reason.of) for reason in reasons(values)} >= {("share_prompt", "packing")}
    for axis in AXES:
        for value in axis.values:
            assert complete({axis.name: value}), f"nothing works with {axis.name} {value}"
