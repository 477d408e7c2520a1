"""What a plan says of `model.dtype`, on machines of every kind."""

from pathlib import Path

import pytest

from ftlaunch.load import load_recipe
from ftlaunch.plan.machine import Machine, _cpu_bf16
from ftlaunch.plan.plan import make_plan

OLD_CPU, NEW_CPU = Machine((), None), Machine((), "AMX")
V100, H100 = Machine((("V100", 7),), "AMX"), Machine((("H100", 9),), None)
MIXED = Machine((("H100", 9), ("V100", 7)), None)
RECIPE = """
name = "r"
model.path = "owner/model"
data.d = {path = "owner/rows", format = "text"}
stage = [{kind = "sft", data = "d"}]
"""


@pytest.mark.parametrize(
    ("machine", "settings", "note"),
    [
        (OLD_CPU, [], "fp32, not bf16, as the CPU here has neither AVX512-BF16 nor AMX (auto)"),
        (NEW_CPU, [], "bf16, as the CPU here has AMX (auto)"),
        (V100, [], "fp16, not bf16, as V100 has no arithmetic for it (auto)"),
        (V100, ["adapter.kind=adalora"], "fp32, not bf16, as V100 has no arithmetic for it (auto)"),
        (V100, ["parallel.device=cpu"], "bf16, as the CPU here has AMX (auto)"),
        (H100, [], "bf16, as H100 computes it natively (auto)"),
        (MIXED, ["parallel.strategy=ddp", "parallel.procs_per_node=2"], "fp16, not bf16, as V100 has no arithmetic"),
        (None, [], "auto: bf16 where the device computes it natively, else fp16 on a GPU and fp32 on a CPU; decided"),
        (OLD_CPU, ["parallel.device=cuda"], "auto: bf16 where the device computes it natively"),
        (OLD_CPU, ["model.dtype=bf16"], "bf16, which is emulated and slow, as the CPU here has neither"),
        (NEW_CPU, ["model.dtype=bf16"], "bf16"),
        (OLD_CPU, ["model.dtype=fp32"], "fp32"),
        (None, ["model.dtype=bf16"], "bf16"),
    ],
)
def test_the_plan_says_which_format_and_why(machine: Machine | None, settings: list[str], note: str, tmp_path: Path):
    path = tmp_path / "r.toml"
    path.write_text(RECIPE)
    [step] = make_plan(load_recipe(path, settings).recipe, tmp_path / "run", machine).stages
    assert step.notes["dtype"].startswith(note)
    assert len(note) > 8 or step.notes["dtype"] == note


@pytest.mark.parametrize(
    ("line", "instructions"),
    [
        ("flags\t\t: fpu sse2 avx2 avx512f avx512_bf16", "AVX512-BF16"),
        ("flags\t\t: fpu avx512_bf16x", None),
        ("Features\t: fp asimd bf16 i8mm", "Arm's BF16"),
        ("flags\t\t: fpu sse2 avx2 avx512f", None),
    ],
)
def test_a_cpu_is_known_by_its_flags(
    line: str, instructions: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: bf16\n{line}\n")
    assert _cpu_bf16(tmp_path / "cpuinfo") == instructions
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert _cpu_bf16(tmp_path / "cpuinfo") is None
