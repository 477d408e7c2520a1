"""What the table of ftlaunch.compatibility says works is tried: trained, saved, killed, resumed, evaluated, merged.

Ranks are real processes, under real DeepSpeed: two under ddp, one or two by turns under ZeRO. CI tries the first of a
sample in which any two values that work together meet; `make compatibility` tries all of it.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from tests.faults.orders import Fault
from tests.faults.ranks import Ranks, said, with_parallel, write_run
from tests.faults.test_kills import outcome
from tests.specimens import Specimens, covering

from ftlaunch.compatibility.axes import Combination
from ftlaunch.recipe import Recipe
from ftlaunch.rules import judge
from ftlaunch.rundir import StepDir, read_jsonl

IN_CI = 24
KILLED_AT = 4


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Ranks that start in a moment."""
    started = Ranks(tmp_path_factory.mktemp("cache"), OMP_NUM_THREADS="1")
    yield started
    started.close()


@pytest.fixture(scope="module")
def specimens(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Specimens:
    return Specimens(str(tiny_model), tmp_path_factory.mktemp("specimens"))


def processes(strategy: str, number: int) -> int:
    """Ranks of a trial."""
    return {"single": 1, "ddp": 2}.get(strategy, 1 + number % 2)


def made(specimens: Specimens, combination: Combination, number: int) -> Recipe:
    loaded = specimens.load(combination, number)
    recipe = with_parallel(loaded.recipe, combination["strategy"], processes(combination["strategy"], number))
    assert judge(loaded) == []
    return recipe


def try_out(recipe: Recipe, combination: Combination, ranks: Ranks, folder: Path) -> None:
    """Train and be killed, go on, and end as one that was left alone; then do what comes after."""
    name = f"01-{combination['stage']}"
    calm, killed = (write_run(recipe, folder / run) for run in ("calm", "killed"))
    ranks.run(calm.step_dir(name))
    step = killed.step_dir(name)
    ranks.start(step, Fault("kill", step=KILLED_AT, at="save"))
    assert any(ranks.wait())
    assert not step.result.exists()
    assert (step.checkpoints / "step-00000002").is_dir(), said(step)
    if combination["resumed_by"] == "other_ranks":
        others = 3 - recipe.parallel.world_size
        strategy = {"single": "ddp", "ddp": "single"}.get(recipe.parallel.strategy, recipe.parallel.strategy)
        write_run(with_parallel(recipe, strategy, others), killed.path)
    ranks.run(step)
    assert_same(step, calm.step_dir(name), exactly=combination["resumed_by"] == "same_ranks")
    for behind in calm.step_dirs()[1:]:
        ranks.run(behind)


def assert_same(step: StepDir, calm: StepDir, *, exactly: bool) -> None:
    """The same end as a run that was left alone: to the last bit, or, where others went on, of the same rows."""
    if exactly:
        assert outcome(step) == outcome(calm), said(step)
    ours, theirs = (list(read_jsonl(each.metrics)) for each in (step, calm))
    assert [(line["step"], line.get("tokens")) for line in ours] == [
        (line["step"], line.get("tokens")) for line in theirs
    ]
    assert any(key.startswith("eval/") for line in ours for key in line)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sample = covering({"device": "cpu"})
    tried = sample if metafunc.config.getoption("--all-trials") else islice(sample, IN_CI)
    metafunc.parametrize(("number", "combination"), enumerate(tried), ids=lambda value: str(value)[:3])


def test_what_works_is_trained_killed_resumed_evaluated_and_merged(
    number: int, combination: dict[str, str], specimens: Specimens, ranks: Ranks, tmp_path: Path
) -> None:
    print(combination)
    try_out(made(specimens, combination, number), combination, ranks, tmp_path)
