"""What the table of compatibility says works is tried: trained, saved, killed, resumed, evaluated, merged.

Ranks are real processes, under real DeepSpeed, and one is killed by SIGKILL: two under ddp, one or two by turns under
ZeRO. CI tries the first of a sample in which any two values that work together meet; `make compatibility` tries all of
it, and every cell of method × stage × strategy × quantization.
"""

from itertools import islice
from pathlib import Path

import pytest
from tests.faults.rank_faults import Fault
from tests.faults.ranks import Ranks, said, with_parallel, write_run
from tests.faults.test_kills import outcome
from tests.sample_recipes import SampleRecipes, covering

from ftlaunch.recipe.recipe import Recipe
from ftlaunch.rules import find_problems
from ftlaunch.rules.compatibility import complete
from ftlaunch.rules.compatibility.axes import Combination
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir

IN_CI = 10
"""Three in four of all pairs meet in these."""
HEADS = [{"device": "cpu", "strategy": "zero3", "dtype": "bf16", "stage": stage} for stage in ("reward", "ppo")]
"""Weights made for a model that is loaded in shards, in another format than it was stored in."""
KILLED_AT = 4
CLOSE = 1e-4


@pytest.fixture(scope="module")
def sample_recipes(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> SampleRecipes:
    return SampleRecipes(str(tiny_model), tmp_path_factory.mktemp("sample_recipes"))


def processes(strategy: str, number: int) -> int:
    """Ranks of a trial."""
    return {"single": 1, "ddp": 2}.get(strategy, 1 + number % 2)


def made(sample_recipes: SampleRecipes, combination: Combination, number: int) -> Recipe:
    loaded = sample_recipes.load(combination, number)
    recipe = with_parallel(loaded.recipe, combination["strategy"], processes(combination["strategy"], number))
    assert find_problems(loaded) == []
    return recipe


def try_out(recipe: Recipe, combination: Combination, ranks: Ranks, folder: Path) -> None:
    """Train and be killed, go on, and end as one that was left alone; then do what comes after."""
    name = f"01-{combination['stage']}"
    calm, killed = (write_run(recipe, folder / run) for run in ("calm", "killed"))
    ranks.run(calm.stage_dir(name))
    stage_dir = killed.stage_dir(name)
    ranks.start(stage_dir, Fault("kill", step=KILLED_AT, at="save"))
    assert any(ranks.wait())
    assert not stage_dir.result.exists()
    assert (stage_dir.checkpoints / "step-00000002").is_dir(), said(stage_dir)
    if combination["resumed_by"] == "other_ranks":
        others = 3 - recipe.parallel.world_size
        strategy = {"single": "ddp", "ddp": "single"}.get(recipe.parallel.strategy, recipe.parallel.strategy)
        write_run(with_parallel(recipe, strategy, others), killed.path)
    ranks.run(stage_dir)
    if combination["resumed_by"] == "same_ranks":
        assert outcome(stage_dir) == outcome(calm.stage_dir(name)), said(stage_dir)
    else:
        assert_close(course(stage_dir), course(calm.stage_dir(name)), CLOSE if is_quiet(combination) else None)
    assert any(key.startswith("eval/") for line in read_jsonl(stage_dir.metrics) for key in line)
    for later in calm.stage_dirs()[1:]:
        ranks.run(later)


def is_quiet(combination: Combination) -> bool:
    """Whether nothing is drawn, and little enough is rounded, that other ranks get the same losses."""
    quiet = {
        "noise": "none",
        "neftune": "off",
        "r_drop": "off",
        "dropout": "off",
        "dtype": "fp32",
        "optimizer": "adamw",
    }
    held = combination["quantization"] in ("none", "nf4", "fp4")
    return held and combination["stage"] != "ppo" and quiet.items() <= combination.items()


def course(stage_dir: StageDir) -> list[tuple[int, int, float]]:
    """Step, tokens so far, which would differ with other rows, and loss."""
    return [(line["step"], line["tokens"], line["loss"]) for line in read_jsonl(stage_dir.metrics) if "loss" in line]


def assert_close(ours: list[tuple[int, int, float]], theirs: list[tuple[int, int, float]], close: float | None) -> None:
    """The same steps of the same rows and, where it is said how close, losses as close as that."""
    assert [line[:2] for line in ours] == [line[:2] for line in theirs]
    if close is not None:
        assert [line[2] for line in ours] == pytest.approx([line[2] for line in theirs], abs=close)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Have a test for each combination that is tried."""
    sample = covering({"device": "cpu"})
    tried = sample if metafunc.config.getoption("--all-trials") else islice(sample, IN_CI)
    cases = [pytest.param(number, combination, id=str(number)) for number, combination in enumerate(tried)]
    heads = [pytest.param(number, complete(head), id=f"head of {head['stage']}") for number, head in enumerate(HEADS)]
    metafunc.parametrize(("number", "combination"), [*heads, *cases])


def test_what_works_is_trained_killed_resumed_evaluated_and_merged(
    number: int, combination: dict[str, str], sample_recipes: SampleRecipes, ranks: Ranks, tmp_path: Path
) -> None:
    print(combination)
    try_out(made(sample_recipes, combination, number), combination, ranks, tmp_path)
