"""N ranks under one strategy, then M ranks under any: the losses and the order of rows are those of an unbroken run."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.faults.rank_faults import Fault
from tests.faults.ranks import Ranks, said, with_parallel, write_run

from ftlaunch.errors import STOPPED
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir

SETTINGS = ("stage.sft.steps=20", "stage.sft.batch_size=12")
SHAPES = [(strategy, size) for strategy in ("ddp", "zero1", "zero2", "zero3") for size in (1, 2, 3, 4)]
HALF = 10
TOLERANCE = 1e-6


def course(stage_dir: StageDir) -> list[tuple[int, float, int]]:
    """Step, loss, and tokens so far, which would differ with other rows."""
    return [(line["step"], line["loss"], line["tokens"]) for line in read_jsonl(stage_dir.metrics) if "loss" in line]


@pytest.fixture(scope="module")
def unbroken(load: Callable[..., Recipe], ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> StageDir:
    stage_dir = write_run(with_parallel(load(*SETTINGS), "ddp", 1), tmp_path_factory.mktemp("calm") / "run").stage_dir(
        "01-sft"
    )
    ranks.run(stage_dir)
    return stage_dir


def test_any_number_of_ranks_goes_on_where_any_other_left(
    load: Callable[..., Recipe], ranks: Ranks, unbroken: StageDir, trials: Callable[[int, int], int], tmp_path: Path
):
    recipe = load(*SETTINGS)
    firsts, seconds = (SHAPES, SHAPES) if trials(0, 1) else ([("zero3", 2)], [("zero2", 3), ("ddp", 1)])
    gaps = []
    for first in firsts:
        half = write_run(with_parallel(recipe, *first), tmp_path / "half").stage_dir("01-sft")
        ranks.start(half, Fault("ask", step=HALF))
        assert ranks.wait() == [STOPPED] * first[1], said(half)
        for second in seconds:
            folder = Path(shutil.copytree(half.path.parent, tmp_path / "whole", symlinks=True))
            stage_dir = write_run(with_parallel(recipe, *second), folder).stage_dir("01-sft")
            ranks.run(stage_dir)
            gaps.append(_gap(stage_dir, unbroken))
            print(f"{first[0]} × {first[1]} → {second[0]} × {second[1]}: {gaps[-1]:.1e}", flush=True)
            shutil.rmtree(folder)
        shutil.rmtree(half.path.parent)
    print(f"{len(gaps)} changes, worst difference of a loss {max(gaps):.1e}")


def _gap(stage_dir: StageDir, unbroken: StageDir) -> float:
    """Largest difference of a loss; steps and tokens must be the same."""
    ours, theirs = course(stage_dir), course(unbroken)
    assert [(number, tokens) for number, _, tokens in ours] == [(number, tokens) for number, _, tokens in theirs]
    gap = max(abs(mine[1] - other[1]) for mine, other in zip(ours, theirs, strict=True))
    assert gap < TOLERANCE
    return gap
