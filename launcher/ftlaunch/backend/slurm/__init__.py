"""Runs as SLURM jobs, and on nodes of a job that the user holds."""

import os
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftlaunch.backend.protocol import Backend
    from ftlaunch.cluster.vocabulary import Cluster
    from ftlaunch.run.layout import RunDir


def choose(run: "RunDir | None", cluster: "Cluster | None", otherwise: "Backend | None") -> "Backend | None":
    """Jobs where a profile is named or the run was submitted; the nodes of a job that this is in, or the run was in.

    Held nodes are for runs that a process here drives, and drive `otherwise` what this machine has room for.
    """
    from ftlaunch.backend.driving import Driven
    from ftlaunch.backend.slurm import paths

    if cluster is not None:
        from ftlaunch.backend.slurm.backend import Slurm

        return Slurm(lambda: cluster)
    if run is not None and paths.cluster(run).exists():
        from ftlaunch.backend.slurm.backend import Slurm
        from ftlaunch.backend.slurm.queue import read_cluster

        # Not read yet: `status` also works on a run whose cluster.json was written by another version of ftlaunch.
        return Slurm(partial(read_cluster, run))
    if isinstance(otherwise, Driven) and ("SLURM_JOB_ID" in os.environ or (run and paths.held(run).exists())):
        from ftlaunch.backend.slurm.held import Held  # it needs submitit, which takes its time to load

        return Held(otherwise)
    return otherwise
