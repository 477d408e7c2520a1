"""The processes of a stage: which one this is, and how all of them agree."""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from ftlaunch.errors import UserError
from ftlaunch.run.spec import StageSpec

T = TypeVar("T")
PATIENCE = timedelta(hours=2)
"""Ranks may wait so long in one collective, such as for the rank that writes a large artifact.

A rank that has died is noticed at once and one that hangs by the launcher, so nobody waits in vain. Unset, it would be
10 minutes under NCCL and DeepSpeed and 30 under gloo.
"""


@dataclass(frozen=True)
class World:
    """One process and its peers: ranks, devices, and the collectives by which they agree."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    peers: tuple[tuple[str, int], ...]
    """Host and pid of every rank, in order."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum over all ranks, element by element, the same on each."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def max(self, value: float) -> float:
        """Largest value of all ranks."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank, on each of them."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def collect(self, mine: Mapping[int, T], count: int) -> list[T]:
        """All ranks' values in the order of their numbers, from 0 to below `count`; each rank has some of them."""
        every = {number: value for part in self.gather(mine) for number, value in part.items()}
        return [every[number] for number in range(count)]

    def from_main(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def dead_peers(self) -> list[int]:
        """Ranks on this host whose process is gone or is a zombie."""
        here = socket.gethostname()
        return [rank for rank, (host, pid) in enumerate(self.peers) if host == here and not _is_alive(pid)]


def start(spec: StageSpec) -> World:
    """Join the process group that the plan asked for.

    Raises UserError where the machine cannot be what the plan says: too few GPUs, fp16 on a CPU, another world size.
    """
    device = _pick_device(spec)
    if spec.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    # DeepSpeed is kept although the device is the CPU only if the state exists before the Accelerator asks for it.
    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    if spec.parallel.zero_stage:
        _introduce_deepspeed(device)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    assert state.num_processes == spec.world_size, f"{state.num_processes} processes, planned {spec.world_size}"
    where = torch.device(state.device or device)
    alone = World(state.process_index, state.num_processes, state.local_process_index, local_size, where, ())
    return replace(alone, peers=tuple(alone.gather((socket.gethostname(), os.getpid()))))


def leave(world: World) -> None:
    """Leave the process group once all ranks are done with it."""
    world.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def _pick_device(spec: StageSpec) -> str:
    wanted = spec.parallel.device
    gpus = torch.cuda.device_count()
    if wanted == "cuda" and gpus == 0:
        raise UserError("parallel.device is cuda, but torch sees no GPU here", 'set parallel.device = "auto" or "cpu"')
    device = "cpu" if wanted == "cpu" or gpus == 0 else "cuda"
    if device == "cuda" and gpus < spec.parallel.procs_per_node:
        raise UserError(
            f"{spec.parallel.procs_per_node} processes per node are planned, but there are {gpus} GPUs",
            f"set parallel.procs_per_node = {gpus}",
        )
    if device == "cpu" and spec.model.dtype == "fp16":
        raise UserError("fp16 training needs a GPU", 'set model.dtype = "bf16" or "fp32"')
    return device


def _introduce_deepspeed(device: str) -> None:
    """Let DeepSpeed join the process group now: ZeRO-3 shards weights while the model is loaded."""
    import deepspeed
    import deepspeed.ops

    if device == "cpu":
        # Its shared-memory collective wants a compiler at start, and its ranks spin for ever once a peer has died.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if device == "cpu" else "nccl"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=PATIENCE)


def _is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
