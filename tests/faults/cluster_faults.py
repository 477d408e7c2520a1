"""What can befall a run on the devcluster, and healing the cluster after it."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from ftlaunch import processes
from ftlaunch.backend.slurm import queue
from ftlaunch.run.layout import Attempt, StageDir

DEVCLUSTER = Path(__file__).parent.parent.parent / "slurm/devcluster"
STATE = Path("/tmp/ftlaunch-devcluster")
CONF = {"SLURM_CONF": str(STATE / "slurm.conf")}
OUTAGE_SECONDS = 20.0
"""A node stays away longer than SLURM waits for it (SlurmdTimeout)."""
NODE = re.compile(rb"\0SLURMD_NODENAME=([^\0]+)\0")


class Target(Struct, frozen=True):
    """A rank that is at work, and where."""

    attempt: Attempt
    job: str
    rank: int
    pid: int
    node: str


def find_target(stage_dir: StageDir, draw: random.Random) -> Target | None:
    """A rank of the newest attempt; None where none is alive."""
    attempts, job = stage_dir.all_attempts(), queue.read_job(stage_dir)
    alive = processes.ranks_of(attempts[-1].path, range(8)) if attempts else {}
    if not alive or job is None:
        return None
    rank = draw.choice(sorted(alive))
    try:
        node = NODE.search(b"\0" + Path(f"/proc/{alive[rank]}/environ").read_bytes())
    except OSError:
        return None
    return Target(attempts[-1], job.id, rank, alive[rank], node[1].decode()) if node else None


def slurm(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=os.environ | CONF, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def heal() -> None:
    """Start what is missing of the cluster, cables included, without waiting for it."""
    quiet = subprocess.DEVNULL
    subprocess.Popen([sys.executable, str(DEVCLUSTER), "up"], stdout=quiet, stderr=quiet)


def kill_rank(target: Target) -> str:
    os.kill(target.pid, signal.SIGKILL)
    return f"SIGKILL of rank {target.rank}"


def stop_rank(target: Target) -> str:
    os.kill(target.pid, signal.SIGSTOP)
    return f"SIGSTOP of rank {target.rank}"


def kill_node(target: Target) -> str:
    _end(target.node, signal.SIGKILL)
    time.sleep(OUTAGE_SECONDS)
    heal()
    return f"node {target.node} killed"


def cut_network(target: Target) -> str:
    subprocess.run(["ip", "link", "set", f"ftl-{target.node}", "down"], check=True)
    time.sleep(OUTAGE_SECONDS)
    heal()
    return f"network of {target.node} cut"


def requeue(target: Target) -> str:
    slurm("scontrol", "requeue", target.job).wait()
    return "scontrol requeue"


def preempt(_: Target) -> str:
    slurm("srun", "--partition=urgent", "--nodes=3", "--exclusive", "sleep", "1")
    return "preempted by an urgent job on all nodes"


def restart_controller(_: Target) -> str:
    _end("slurmctld", signal.SIGTERM)
    time.sleep(3)
    heal()
    return "slurmctld restarted"


def _end(daemon: str, number: signal.Signals) -> None:
    os.kill(int((STATE / "pid" / daemon).read_text().split()[0]), number)


FAULTS: tuple[Callable[[Target], str], ...] = (
    kill_rank,
    stop_rank,
    kill_node,
    cut_network,
    requeue,
    preempt,
    restart_controller,
)
"""Each comes back with a description of what it has done."""
