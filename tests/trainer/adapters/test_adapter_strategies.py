"""Two processes under each strategy train the same adapter as one process alone."""

from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from tests.faults.ranks import Ranks, with_parallel, write_run
from tests.trainer.conftest import RECIPE

from ftlaunch.load import load_recipe
from ftlaunch.recipe.adapter import Adalora, Adapter, Dora, Lora, Pissa, Prefix, Prompt, PTuning, Rslora, Virtual
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.recipe.stages import Optimizer

ADAPTERS: dict[str, tuple[Adapter, Optimizer]] = {
    "rslora": (Rslora(rank=4, alpha=8, layers="top:1"), Optimizer()),
    "prompt": (Prompt(virtual_tokens=5), Optimizer()),
    "prefix": (Prefix(virtual_tokens=5, projection=True, hidden_size=24), Optimizer()),
    "p_tuning": (PTuning(virtual_tokens=5, hidden_size=24), Optimizer()),
    "lora_plus": (Lora(rank=4, alpha=8), Optimizer(lora_plus_ratio=4, weight_decay=0.1)),
    "dora": (Dora(rank=4, alpha=8), Optimizer()),
    "pissa": (Pissa(rank=4, alpha=8), Optimizer()),
    "adalora": (Adalora(rank=2, alpha=8, initial_rank=5, prune_after=0.3, prune_until=0.9), Optimizer()),
}
STRATEGIES = ("ddp", "zero2", "zero3")


@pytest.fixture
def recipe(tiny_model: Path, rows_file: Path, tmp_path: Path) -> Recipe:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(model=tiny_model, rows=rows_file, dropout=0.0))
    return load_recipe(path, ["stage.sft.steps=5", "stage.sft.save_every=5", "stage.sft.learning_rate=1e-3"]).recipe


def weights(ranks: Ranks, recipe: Recipe, folder: Path) -> dict[str, torch.Tensor]:
    stage_dir = write_run(recipe, folder).stage_dir("01-sft")
    ranks.run(stage_dir)
    return load_file(stage_dir.artifact / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ADAPTERS)
def test_two_processes_train_what_one_does(name: str, recipe: Recipe, ranks: Ranks, tmp_path: Path) -> None:
    adapter, optimizer = ADAPTERS[name]
    stage = msgspec.structs.replace(recipe.stage[0], packing=not isinstance(adapter, Virtual))
    recipe = msgspec.structs.replace(recipe, adapter=adapter, optimizer=optimizer, stage=[stage])
    alone = weights(ranks, recipe, tmp_path / "alone")
    for strategy in STRATEGIES:
        together = weights(ranks, with_parallel(recipe, strategy, 2), tmp_path / strategy)
        assert together.keys() == alone.keys()
        for key, weight in alone.items():
            # Where a gradient is all but 0, a last bit's difference may turn the sign of an AdamW step.
            assert (weight - together[key]).abs().mean() < 1e-5, (strategy, key)
            torch.testing.assert_close(together[key], weight, atol=2e-3, rtol=1e-2)


def test_dora_over_weights_in_4_bits_is_sharded(recipe: Recipe, ranks: Ranks, tmp_path: Path) -> None:
    """The shape of recipes/llama3_dora.toml."""
    model = msgspec.structs.replace(recipe.model, quantization="nf4")
    recipe = msgspec.structs.replace(recipe, adapter=Dora(rank=4, alpha=8), model=model)
    alone = weights(ranks, recipe, tmp_path / "alone")
    together = weights(ranks, with_parallel(recipe, "zero3", 2), tmp_path / "zero3")
    assert together.keys() == alone.keys()
    for key, weight in alone.items():
        torch.testing.assert_close(together[key], weight, atol=2e-3, rtol=1e-2)
