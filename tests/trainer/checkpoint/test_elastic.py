"""A run goes on with other ranks under another strategy, and learns what it would have learnt."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.faults.rank_faults import Fault
from tests.faults.ranks import Ranks, said, with_parallel, write_run

from ftlaunch.errors import STOPPED
from ftlaunch.load import load_recipe
from ftlaunch.recipe.adapter import Adapter, Full, Lora
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir

LEGS = (("zero3", 2), ("ddp", 1), ("zero2", 3), ("ddp", 2))
"""Strategy and processes, each for a quarter of the run."""
STEPS = 12
SETTINGS = [f"stage.sft.steps={STEPS}", "stage.sft.batch_size=12", "stage.sft.evaluate_every=5"]
TOLERANCE = 1e-6


def course(stage_dir: StageDir) -> list[tuple[int, str, float]]:
    """Every loss of a run, of training and evaluation."""
    lines = list(read_jsonl(stage_dir.metrics))
    return [(line["step"], key, line[key]) for line in lines for key in ("loss", "eval/loss") if key in line]


@pytest.mark.parametrize("adapter", [Lora(rank=4, alpha=8), Full()], ids=["lora", "full"])
def test_any_ranks_go_on_where_any_others_left(
    adapter: Adapter, ranks: Ranks, recipe: Callable[..., Path], tmp_path: Path
):
    import msgspec

    written = msgspec.structs.replace(load_recipe(recipe(), SETTINGS).recipe, adapter=adapter)
    calm = write_run(with_parallel(written, "ddp", 1), tmp_path / "calm").stage_dir("01-sft")
    ranks.run(calm)
    for number, (strategy, processes) in enumerate(LEGS, start=1):
        stage_dir = write_run(with_parallel(written, strategy, processes), tmp_path / "legs").stage_dir("01-sft")
        ranks.start(stage_dir, Fault("ask", step=number * STEPS // len(LEGS)))
        expected = STOPPED if number < len(LEGS) else 0
        assert ranks.wait() == [expected] * processes, said(stage_dir)
    for ours, theirs in zip(course(stage_dir), course(calm), strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2] == pytest.approx(theirs[2], abs=TOLERANCE)
