"""What this machine computes with, as far as can be told without torch: for a plan's word on `model.dtype`."""

import os
import shutil
import subprocess
from pathlib import Path

from msgspec import Struct

BF16_FLAGS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX", "bf16": "Arm's BF16"}
"""Flags in /proc/cpuinfo → names of the instructions."""
ISA_LIMIT, WITHOUT_BF16 = "ONEDNN_MAX_CPU_ISA", {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2"}
"""The variable that limits torch's oneDNN to older instructions, and those of its values that have no bf16."""
NATIVE_FROM = 8
"""Major compute capability from which NVIDIA's GPUs have arithmetic for bf16."""
PATIENCE = 10.0
"""Seconds that nvidia-smi may take."""


class Machine(Struct, frozen=True):
    """The devices of a machine."""

    gpus: tuple[tuple[str, int], ...]
    """Name and major compute capability of each GPU."""
    cpu_bf16: str | None
    """What the CPU multiplies bf16 matrices with; None where it has nothing for that."""


def look() -> Machine:
    """This machine."""
    return Machine(_gpus(), _cpu_bf16(Path("/proc/cpuinfo")))


def _cpu_bf16(cpuinfo: Path) -> str | None:
    if os.environ.get(ISA_LIMIT, "").upper() in WITHOUT_BF16:
        return None
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return None
    # x86 has lines such as "flags : fpu avx512_bf16", Arm "Features : fp bf16".
    flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    return next((name for flag, name in BF16_FLAGS.items() if flag in flags), None)


def nvidia_smi(query: str, *, units: bool = True) -> list[str]:
    """What NVIDIA's tool says of each GPU of the machine; nothing where it is missing or does not answer."""
    if shutil.which("nvidia-smi") is None:
        return []
    form = "csv,noheader" if units else "csv,noheader,nounits"
    command = ["nvidia-smi", f"--query-gpu={query}", f"--format={form}"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return said.stdout.splitlines()


def _gpus() -> tuple[tuple[str, int], ...]:
    """NVIDIA's GPUs that a process here would see."""
    # nvidia-smi lists all GPUs of the machine, whatever CUDA_VISIBLE_DEVICES hides from torch.
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    # A line reads "8.0, NVIDIA A100-SXM4-80GB".
    found = (line.partition(", ") for line in ([] if hidden else nvidia_smi("compute_cap,name")))
    return tuple((name, int(major)) for cap, _, name in found if (major := cap.partition(".")[0]).isdigit())
