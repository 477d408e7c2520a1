"""What `ftlaunch doctor` looks at on each node, as the task that a stage would have there."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from msgspec import Struct

from ftlaunch.backend.slurm import rendezvous
from ftlaunch.errors import UserError
from ftlaunch.plan.machine import nvidia_smi
from ftlaunch.run.files import write_json
from ftlaunch.run.provenance import installed

TOKEN = "token"
HEAD = "head.json"
MEET_SECONDS = 10.0
REDUCE_SECONDS = 120.0
"""torch may take a while to be read from a shared folder."""
TRAINER = "fttrain"


class Finding(Struct, frozen=True, kw_only=True):
    """What one node sees."""

    node: str
    python: str
    packages: dict[str, str]
    """Version of each package that training needs; empty text where it is missing."""
    shared: bool
    """Whether what the login node wrote is there."""
    time: float
    """Unix time in seconds, as this was written."""
    free_bytes: int
    """Free space of the shared folder."""
    scontrol: bool
    gpus: list[str]
    """Name and driver of each, as nvidia-smi tells them."""
    meets: str | None
    """Why the first node cannot be reached; None where it can."""
    reduced: str
    """What the all-reduce over all nodes said: how it went, or what went wrong."""
    reduces: bool
    """Whether its sums were right."""


def look(name: str, interface: str | None) -> None:
    """Leave a finding in the folder of that name."""
    folder, rank = Path(name), int(os.environ["SLURM_PROCID"])
    meets = _meet(folder, rank, interface)
    reduces, reduced = (False, "not tried") if meets else _reduce(folder, rank, interface)
    finding = Finding(
        node=os.environ["SLURMD_NODENAME"],
        python=sys.version.split()[0],
        packages=installed(),
        shared=(folder / TOKEN).exists(),
        free_bytes=shutil.disk_usage(folder).free,
        scontrol=shutil.which("scontrol") is not None,
        gpus=nvidia_smi("name,driver_version"),
        meets=meets,
        reduced=reduced,
        reduces=reduces,
        time=time.time(),
    )
    write_json(folder / f"node{rank}.json", finding)


def _meet(folder: Path, rank: int, interface: str | None) -> str | None:
    """Why this node and the first one cannot meet as the ranks of a stage would; None where they do."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    names = list(SlurmJobEnvironment().hostnames)
    try:
        if len(names) == 1:
            write_json(folder / HEAD, ["127.0.0.1", rendezvous.free_port(int(os.environ["SLURM_JOB_ID"]), 0)])
            return None
        return _listen(folder, names, interface) if rank == 0 else _knock(folder)
    except (UserError, OSError) as error:
        return str(error).partition("\n")[0]


def _listen(folder: Path, names: list[str], interface: str | None) -> None:
    address = rendezvous.own_address(names[1:], interface)
    port = rendezvous.free_port(int(os.environ["SLURM_JOB_ID"]), 0)
    with socket.create_server((address, port)) as server:
        server.settimeout(MEET_SECONDS)
        # Only while the socket listens: other nodes connect as soon as they see the file.
        write_json(folder / HEAD, [address, port])
        for _ in names[1:]:
            server.accept()[0].close()


def _knock(folder: Path) -> None:
    deadline = time.monotonic() + MEET_SECONDS
    while not (folder / HEAD).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    address, port = msgspec.json.decode((folder / HEAD).read_bytes(), type=tuple[str, int])
    socket.create_connection((address, port), timeout=MEET_SECONDS).close()


def _reduce(folder: Path, rank: int, interface: str | None) -> tuple[bool, str]:
    """Whether an all-reduce over all nodes, in ranks such as a stage has, gave the right sums; and its words."""
    address, port = msgspec.json.decode((folder / HEAD).read_bytes(), type=tuple[str, int])
    variables = os.environ | {"RANK": str(rank), "WORLD_SIZE": os.environ["SLURM_NTASKS"]}
    has_gpu = str(int(bool(nvidia_smi("name"))))
    variables |= {"MASTER_ADDR": address, "MASTER_PORT": str(port), "FTLAUNCH_REDUCE_GPU": has_gpu}
    variables |= rendezvous.network_variables([address], interface)
    # -P keeps the working directory off sys.path, where a user's json.py would be imported instead.
    command = [sys.executable, "-P", "-m", f"{TRAINER}.distributed.all_reduce"]
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=REDUCE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer for {REDUCE_SECONDS:g} s"
    if done.returncode:
        return False, (done.stderr.strip().splitlines() or ["no word"])[-1]
    # Libraries may print lines of their own first.
    told = json.loads(done.stdout.splitlines()[-1])
    nccl = f" {told['nccl']}" if told["nccl"] else ""
    return True, f"{told['backend']}{nccl}, {told['seconds'] * 1000:.0f} ms for a million floats"
