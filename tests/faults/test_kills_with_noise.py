"""A rank killed while activations are noisy: the resumed run draws the noise that one left alone would have drawn."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.faults.rank_faults import Fault
from tests.faults.ranks import Ranks, said, with_parallel, write_run
from tests.faults.test_kills import outcome

from ftlaunch.recipe.recipe import Recipe
from ftlaunch.run.layout import StageDir

NOISES = {
    "ddp": ["noise.kind=adversarial", "noise.activation=golu", "stage.0.neftune_alpha=5"],
    "zero2": ["noise.kind=gaussian", "noise.schedule=linear", "stage.0.neftune_alpha=5", "stage.0.r_drop=1.0"],
    "zero3": ["noise.kind=locked_dropout", "noise.activation=relu", "stage.0.activation_checkpointing=true"],
}


def random_state(stage_dir: StageDir, rank: int) -> torch.Tensor:
    with safe_open(max(stage_dir.checkpoints.glob("step-*")) / f"rank{rank}.safetensors", "pt") as file:
        return file.get_tensor("rng|torch")


@pytest.mark.parametrize("strategy", NOISES)
def test_a_killed_noisy_run_ends_as_if_it_had_not_been(
    strategy: str, load: Callable[..., Recipe], ranks: Ranks, tmp_path: Path
):
    settings = [*NOISES[strategy], "stage.0.steps=6", "stage.0.save_every=2", "stage.0.batch_size=8"]
    recipe = with_parallel(load(*settings), strategy, 2)
    calm, killed = (write_run(recipe, tmp_path / name).stage_dir("01-sft") for name in ("calm", "killed"))
    ranks.run(calm)
    assert not torch.equal(random_state(calm, 0), random_state(calm, 1))
    ranks.start(killed, Fault("kill", step=5, rank=1))
    assert any(ranks.wait())
    assert not killed.result.exists()
    ranks.run(killed)
    assert outcome(killed) == outcome(calm), said(killed)
