"""The same training, however it is shared out: over micro-batches, processes, ZeRO stages and layouts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import RunStages

from ftlaunch.run.layout import RunDir, StageDir

WAYS = {
    "accumulated": ["stage.sft.micro_batch_size=2"],
    "padded": ["stage.sft.packing=false"],
    "checkpointed": ["stage.sft.activation_checkpointing=true"],
    "ddp": ["parallel.strategy=ddp", "parallel.procs_per_node=2", "stage.sft.micro_batch_size=2"],
    "zero1": ["parallel.strategy=zero1", "parallel.procs_per_node=2"],
    "zero2": ["parallel.strategy=zero2", "parallel.procs_per_node=2", "stage.sft.micro_batch_size=2"],
    "zero3": ["parallel.strategy=zero3", "parallel.procs_per_node=2", "stage.sft.micro_batch_size=2"],
    "zero2-offload": ["parallel.strategy=zero2", "parallel.offload=cpu", "stage.sft.micro_batch_size=4"],
}


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows_file: Path, run_stages: RunStages
) -> Callable[[str], RunDir]:
    """Runs of one recipe in each of the ways, made when they are first asked for."""
    from tests.trainer.conftest import RECIPE

    folder = tmp_path_factory.mktemp("ways")
    path = folder / "tiny.toml"
    path.write_text(RECIPE.format(model=tiny_model, rows=rows_file, dropout=0.0))

    def of(way: str) -> RunDir:
        run = RunDir(folder / way)
        return run if run.path.exists() else run_stages(path, run.path, *WAYS.get(way, []))

    return of


def mean_gradients(stage_dir: StageDir) -> dict[str, torch.Tensor]:
    """AdamW's first moment, a weighted mean of all (clipped) gradients so far, put together from the newest shards."""
    folder = max(stage_dir.checkpoints.glob("step-*"))
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for index_file in sorted(folder.glob("rank*.json")):
        tensors = load_file(index_file.with_suffix(".safetensors"))
        for key, (offset, length) in json.loads(index_file.read_text()).items():
            if key.endswith("|exp_avg"):
                assert tensors[key].numel() == length
                parts.setdefault(key, {})[offset] = tensors[key]
    return {key: torch.cat([pieces[offset] for offset in sorted(pieces)]) for key, pieces in parts.items()}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains_the_same(way: str, runs: Callable[[str], RunDir], losses: Callable, adapter: Callable):
    reference, other = runs("single").stage_dir("01-sft"), runs(way).stage_dir("01-sft")
    assert all(norm > 1e-3 for _, norm in losses(reference))
    for (loss, norm), (loss_2, norm_2) in zip(losses(reference), losses(other), strict=True):
        assert loss_2 == pytest.approx(loss, abs=1e-5)
        assert norm_2 == pytest.approx(norm, abs=1e-5)
    gradients, gradients_2 = mean_gradients(reference), mean_gradients(other)
    assert gradients.keys() == gradients_2.keys()
    assert all(torch.allclose(gradients[name], gradients_2[name], atol=1e-5, rtol=0) for name in gradients)
    weights, weights_2 = adapter(reference), adapter(other)
    assert weights.keys() == weights_2.keys()
    for name, tensor in weights.items():
        # A coordinate whose gradient is all but 0 may take an AdamW step of another sign for a last bit's difference.
        assert (tensor - weights_2[name]).abs().mean() < 1e-5, name


def test_full_fine_tuning_under_zero3_equals_one_process(
    tmp_path: Path, recipe: Callable[..., Path], run_stages: RunStages, losses: Callable
):
    path, found = recipe(), []
    full = ["adapter.kind=full", "stage.sft.learning_rate=1e-3", "stage.sft.steps=3"]
    for name, settings in {"one": [], "zero3": WAYS["zero3"]}.items():
        stage_dir = run_stages(path, tmp_path / name, *full, *settings).stage_dir("01-sft")
        found.append((losses(stage_dir), load_file(stage_dir.artifact / "model.safetensors")))
    (losses_1, weights_1), (losses_3, weights_3) = found
    assert losses_3 == [pytest.approx(pair, abs=1e-5) for pair in losses_1]
    assert weights_1.keys() == weights_3.keys()
    assert all(torch.allclose(weights_1[name], weights_3[name], atol=1e-4) for name in weights_1)
