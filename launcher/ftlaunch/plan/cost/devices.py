"""What a stage's processes run on: how much memory there is for each, and how fast it computes."""

import shutil
import subprocess
from pathlib import Path

from msgspec import Struct

from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.plan.machine import PATIENCE, Machine
from ftlaunch.recipe import Parallel

GIB = 1 << 30
GPUS: dict[str, tuple[int, float]] = {
    "H200": (141 * 10**9, 989),
    "H100": (80 * 10**9, 989),
    "A100-SXM4-80GB": (80 * 10**9, 312),
    "A100 80GB": (80 * 10**9, 312),
    "A100": (40 * 10**9, 312),
    "L40S": (48 * 10**9, 362),
    "L4": (24 * 10**9, 121),
    "A6000": (48 * 10**9, 155),
    "A40": (48 * 10**9, 150),
    "A10": (24 * 10**9, 125),
    "4090": (24 * 10**9, 165),
    "V100": (16 * 10**9, 125),
    "T4": (16 * 10**9, 65),
}
"""Part of a GPU's name → bytes of memory, and 10¹² operations a second in 16 bits without sparsity.

From NVIDIA's data sheets. Of a GPU that comes in several sizes the smaller one stands here; nvidia-smi is asked first.
"""


class Device(Struct, frozen=True):
    """What one process has to itself."""

    name: str
    cuda: bool
    memory: int | None = None
    """Bytes. None where nothing tells."""
    host: int | None = None
    """Bytes of the node's memory for each process."""
    teraflops: float | None = None
    """Published peak in 16 bits, in 10¹² operations a second."""


def here(machine: Machine, parallel: Parallel) -> Device:
    """The device of a process on this machine."""
    host = _host_memory() // parallel.procs_per_node
    if parallel.device == "cpu" or not machine.gpus:
        return Device("the CPU", parallel.device == "cuda", None if parallel.device == "cuda" else host, host)
    name, _ = machine.gpus[0]
    memory, teraflops = known_gpu(name) or (None, None)
    return Device(name, True, _gpu_memory() or memory, host, teraflops)


def on_cluster(cluster: Cluster, parallel: Parallel, kind: str) -> Device:
    """The device of a process on a cluster, as far as its profile tells."""
    given = cluster.resources(kind).memory_per_node
    node = _bytes(given) if given not in (None, "0") else None
    host = None if node is None else node // parallel.procs_per_node
    if parallel.device == "cpu" or cluster.gpus == "none":
        return Device("the node's CPUs", False, host, host)
    label = cluster.gpus.partition(":")[2]
    memory, teraflops = known_gpu(label) or (None, None)
    return Device(label or "a GPU", True, memory, host, teraflops)


def known_gpu(name: str) -> tuple[int, float] | None:
    """Memory and speed of a GPU by a name such as "NVIDIA A100-SXM4-80GB", or SLURM's "a100"."""
    return next((said for part, said in GPUS.items() if part.lower() in name.lower()), None)


def _bytes(written: str | None) -> int:
    """Of SLURM's way to write memory: a number of MiB, or of another unit."""
    assert written is not None
    unit = {"K": 10, "M": 20, "G": 30, "T": 40}.get(written[-1])
    return int(written if unit is None else written[:-1]) << (20 if unit is None else unit)


def _host_memory() -> int:
    """Bytes that this machine, or the control group of this process, has."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    total = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemTotal:")), 0)
    limit = Path("/sys/fs/cgroup/memory.max")
    written = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(written)) if written.isdigit() else total


def _gpu_memory() -> int | None:
    """Bytes of the smallest GPU here; None where nvidia-smi does not say."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = [int(line) << 20 for line in said.stdout.split() if line.isdigit()]
    return min(found, default=None)
