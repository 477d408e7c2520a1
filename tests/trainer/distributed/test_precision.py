"""The number format that "auto" comes to: asked of torch, agreed by all ranks, kept by the run."""

import json
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from tests.trainer.in_process import ALONE, make_data, make_step

from ftlaunch.errors import UserError
from ftlaunch.plan import machine
from ftlaunch.recipe.adapter import Adalora, Adapter
from ftlaunch.recipe.model import Dtype
from ftlaunch.run.layout import StageDir
from ftlaunch.run.spec import StageSpec
from fttrain.distributed.precision import Choice, _agreed, computed_in, native, settle

CPU = torch.device("cpu")
BF16, FP16, FP32 = Choice("bf16", "new"), Choice("fp16", "old"), Choice("fp32", "a CPU")


def step(path: Path, dtype: Dtype = "auto", adapter: Adapter | None = None) -> StageSpec:
    made = make_step(path / "model", make_data(path / "rows"), model_fields={"dtype": dtype})
    return made if adapter is None else replace(made, adapter=adapter)


def stage(run: Path, name: str, recorded: Dtype | None = None) -> StageDir:
    folder = StageDir(run / name)
    folder.path.mkdir()
    if recorded:
        folder.precision.write_text(json.dumps({"dtype": recorded, "why": "so it was", "nodes": {}}))
    return folder


def test_the_launcher_foresees_what_torch_says_of_this_cpu():
    assert native(CPU).dtype == ("bf16" if machine.look().cpu_bf16 else "fp32")


def test_the_first_stage_asks_the_device_and_leaves_a_record(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    folder, best = stage(tmp_path, "01-sft"), native(CPU)
    assert settle(step(tmp_path), folder, ALONE).model.dtype == best.dtype
    record = json.loads(folder.precision.read_text())
    assert (record["dtype"], record["why"]) == (best.dtype, best.why)
    assert capfd.readouterr().out == f"computing in {best.dtype}: {best.why}\n"


def test_a_stage_keeps_what_it_began_with_and_says_that_it_is_emulated(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    folder = stage(tmp_path, "01-sft", "bf16")
    before = folder.precision.read_text()
    assert settle(step(tmp_path), folder, ALONE).model.dtype == "bf16"
    assert folder.precision.read_text() == before
    assert ("is emulated" in capfd.readouterr().out) == (native(CPU).dtype != "bf16")


def test_a_new_stage_takes_the_format_of_those_before_it(tmp_path: Path):
    stage(tmp_path, "01-sft", "fp32")
    stage(tmp_path, "03-dpo", "bf16")
    folder = stage(tmp_path, "02-reward")
    assert settle(step(tmp_path), folder, ALONE).model.dtype == "fp32"
    assert json.loads(folder.precision.read_text())["why"] == "01-sft was trained in it"


def test_fp16_goes_on_where_there_is_a_gpu_only(tmp_path: Path):
    begun = stage(tmp_path, "01-sft", "fp16")
    with pytest.raises(UserError, match="01-sft began in fp16, which needs a GPU"):
        settle(step(tmp_path), begun, ALONE)
    assert settle(step(tmp_path), stage(tmp_path, "02-dpo"), ALONE).model.dtype == native(CPU).dtype


def test_what_the_recipe_says_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    folder = stage(tmp_path, "01-sft", "fp32")
    assert settle(step(tmp_path, "bf16"), folder, ALONE).model.dtype == "bf16"
    assert ("is emulated" in capfd.readouterr().out) == (native(CPU).dtype != "bf16")


@pytest.mark.parametrize(
    ("found", "takes_fp16", "dtype"),
    [
        ([("a", "cuda", BF16), ("b", "cuda", BF16)], True, "bf16"),
        ([("a", "cuda", BF16), ("b", "cuda", FP16)], True, "fp16"),
        ([("a", "cuda", BF16), ("b", "cuda", FP16)], False, "fp32"),
        ([("a", "cuda", BF16), ("b", "cpu", FP32)], False, "fp32"),
        ([("a", "cpu", BF16), ("b", "cpu", BF16)], False, "bf16"),
    ],
)
def test_ranks_agree_on_what_suits_all(found: list[tuple[str, str, Choice]], takes_fp16: bool, dtype: Dtype):
    choice = _agreed(found, takes_fp16=takes_fp16)
    assert choice.dtype == dtype
    lacking = [(host, one) for host, _, one in found if one != BF16]
    assert not lacking or choice.why.startswith(f"{lacking[0][1].why} ({lacking[0][0]})")


def test_adalora_never_takes_fp16(tmp_path: Path):
    stage(tmp_path, "01-sft", "fp16")
    adalora = step(tmp_path, adapter=Adalora())
    assert settle(adalora, stage(tmp_path, "02-sft"), ALONE).model.dtype == native(CPU).dtype


def test_a_tool_computes_in_nothing_that_is_emulated():
    best = native(CPU).dtype
    assert computed_in("auto") == best
    assert computed_in("fp32") == "fp32"
    assert computed_in("bf16") == best
