"""Which backend a run is of, as its folder says, and which one a verb asks for."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ftlaunch.backend.slurm import paths
from ftlaunch.errors import UserError
from ftlaunch.processes import lock
from ftlaunch.run.layout import RunDir

if TYPE_CHECKING:
    from ftlaunch.backend.driving import Driven
    from ftlaunch.backend.protocol import Backend
    from ftlaunch.cluster.vocabulary import Cluster


def of(run: RunDir) -> "Backend":
    """The backend that a run was started by last, or was written for."""
    return _slurm(run) if paths.cluster(run).exists() else here(run)


def here(run: RunDir | None = None) -> "Driven":
    """This machine or, in a job of the user's or where a run was last on such nodes, the nodes that are held."""
    from ftlaunch.backend.local.backend import Local

    if "SLURM_JOB_ID" not in os.environ and not (run and paths.held(run).exists()):
        return Local()
    from ftlaunch.backend.slurm.held_backend import Held  # it needs submitit, which takes its time to load

    return Held(otherwise=Local())


def driven(run: RunDir) -> "Driven":
    """The backend of a run that is driven from here. UserError where the run is a cluster's."""
    if paths.cluster(run).exists():
        raise UserError(f"{run.path} is a cluster's to run", "add --cluster NAME, or name another folder with --dir")
    return here(run)


def on(cluster: "Cluster | None") -> "Backend":
    """The backend of a profile: its SLURM cluster. None: here."""
    if cluster is None:
        return here()
    from ftlaunch.backend.slurm.backend import Slurm

    return Slurm(lambda: cluster)


def _slurm(run: RunDir) -> "Backend":
    from ftlaunch.backend.slurm.backend import Slurm
    from ftlaunch.backend.slurm.queue import read_cluster

    # Not read yet: `status` also works on a run whose cluster.json was written by another version of ftlaunch.
    return Slurm(partial(read_cluster, run))


def claim(run: RunDir, backend: "Backend", source: Path | None = None) -> None:
    """Note in a run's folder that the run goes on by a backend from here; see `Backend.claim`."""
    before = of(run)
    backend.claim(run, source)
    if type(before) is not type(backend):
        before.release(run)


def move(run: RunDir, backend: "Backend") -> None:
    """Have a run that is at rest go on elsewhere. UserError where it is being driven or submitted."""
    # A driver on this machine and a submission both hold the lock while they rely on these files.
    held = lock.take(run)
    try:
        claim(run, backend)
    finally:
        lock.release(held)
