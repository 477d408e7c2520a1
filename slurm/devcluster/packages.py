"""The Debian packages that a cluster is made of."""

import os
import shutil
import subprocess
from pathlib import Path

SLURM = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "munged": "munge", "ip": "iproute2"}
ACCOUNTING = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server"}
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Missing(Exception):
    """Programs that are not here and cannot be installed."""


def require(*, accounting: bool) -> None:
    """Have every program that is needed, installing it where this is root. Missing, with the command to give, else."""
    needed = SLURM | (ACCOUNTING if accounting else {})
    missing = sorted({package for program, package in needed.items() if not shutil.which(program, path=SEARCH)})
    if not missing:
        return
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Missing(f"not installed: {', '.join(missing)}\n  → sudo apt-get update && sudo {' '.join(install)}")
    # Their own services stay off: the cluster starts its daemons itself.
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        for command in (["apt-get", "update"], install):
            _run(command)
    finally:
        if ours:
            policy.unlink()


def _run(command: list[str]) -> None:
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, env=quiet, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"`{' '.join(command)}` failed:\n{done.stderr.strip()}")
