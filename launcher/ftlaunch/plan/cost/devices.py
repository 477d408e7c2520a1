"""What a stage's processes run on: how much memory there is for each, and how fast it computes."""

import re
from pathlib import Path

from msgspec import Struct

from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.plan.machine import Machine, nvidia_smi
from ftlaunch.recipe.stages import Parallel

CARDS: tuple[tuple[str, int, float], ...] = (
    ("b200", 180, 2250),
    ("h200 nvl", 141, 835),
    ("h200", 141, 989),
    ("h100 pcie", 80, 756),
    ("h100 nvl", 94, 835),
    ("h100", 80, 989),
    ("a100 80gb", 80, 312),
    ("a100", 40, 312),
    ("a40", 48, 150),
    ("a30", 24, 165),
    ("a10", 24, 125),
    ("l40s", 48, 362),
    ("l40", 48, 181),
    ("l4", 24, 121),
    ("6000 ada", 48, 364),
    ("a6000", 48, 155),
    ("5090", 32, 210),
    ("4090", 24, 165),
    ("3090", 24, 71),
    ("v100 pcie 32gb", 32, 112),
    ("v100 pcie", 16, 112),
    ("v100 32gb", 32, 125),
    ("v100", 16, 125),
    ("t4", 16, 65),
    ("mi325x", 256, 1307),
    ("mi300x", 192, 1307),
    ("mi250x", 64, 191),
)
"""Words of a card's name → GB of memory, and 10¹² operations a second in 16 bits without sparsity.

From the data sheets: NVIDIA's of each data center card, which tell twice as much where they say "with sparsity"; the
architecture papers GA102, AD102 and Blackwell for RTX cards, with sums in fp32; AMD's of each Instinct card. An MI250X
is two devices. Of a card that comes in several sizes the smaller one stands last; nvidia-smi is asked first.
"""
OTHER_CARD = re.compile(r"laptop|mobile|max|d|ti|super|mig|\d+[gqc]")
"""A word by which a card is another than the rest of its name says, or a part of one."""


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
    if parallel.device == "cuda" and not machine.gpus:
        return Device("a GPU", True, None, host)
    if parallel.device == "cpu" or not machine.gpus:
        return Device("the CPU", False, host, host)
    name, _ = machine.gpus[0]
    memory, teraflops = known_gpu(name) or (None, None)
    return Device(name, True, _gpu_memory() or memory, host, teraflops)


def on_cluster(cluster: Cluster, parallel: Parallel, kind: str) -> Device:
    """The device of a process on a cluster, as far as its profile tells."""
    given = cluster.resources(kind).memory_per_node
    # "0" is SLURM's way to ask for all memory of a node, however much that is.
    node = _bytes(given) if given not in (None, "0") else None
    host = None if node is None else node // parallel.procs_per_node
    if parallel.device == "cpu" or cluster.gpus == "none":
        return Device("the node's CPUs", False, host, host)
    label = cluster.gpus.partition(":")[2]
    memory, teraflops = known_gpu(label) or (None, None)
    return Device(label or "a GPU", True, memory, host, teraflops)


def known_gpu(name: str) -> tuple[int, float] | None:
    """Bytes of memory and speed of a GPU by a name such as "NVIDIA A100-SXM4-80GB", or SLURM's "a100"; None where no
    data sheet of exactly that card is known here."""
    said = set(re.split(r"[^a-z0-9]+", name.lower().replace("rtx", " ")))
    if any(OTHER_CARD.fullmatch(word) for word in said):
        return None
    # The first card whose words are all there counts, so CARDS has "h100 pcie" before "h100".
    found = next((card for card in CARDS if said.issuperset(card[0].split())), None)
    return None if found is None else (found[1] * 10**9, found[2])


def _bytes(written: str | None) -> int:
    """Return the bytes that SLURM writes as a number of MiB, or of another unit."""
    assert written is not None
    unit = {"K": 10, "M": 20, "G": 30, "T": 40}.get(written[-1])
    return int(written if unit is None else written[:-1]) << (20 if unit is None else unit)


def _host_memory() -> int:
    """Bytes that this machine, or the control group of this process, has."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    total = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemTotal:")), 0)
    limit = Path("/sys/fs/cgroup/memory.max")
    written = limit.read_text().strip() if limit.exists() else "max"
    # In a container /proc/meminfo still tells the whole machine's memory.
    return min(total, int(written)) if written.isdigit() else total


def _gpu_memory() -> int | None:
    """Bytes of the smallest GPU here; None where nvidia-smi does not say."""
    # nvidia-smi counts in MiB, data sheets in GB of 10⁹ bytes.
    found = [int(line) << 20 for line in nvidia_smi("memory.total", units=False) if line.isdigit()]
    return min(found, default=None)
