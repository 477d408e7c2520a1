"""Which backend a run is of, as its folder says, and which one a verb asks for."""

from importlib import import_module
from pathlib import Path

from ftlaunch.backend.driving import Driven
from ftlaunch.backend.protocol import Backend
from ftlaunch.cluster import NAME_ONE
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import UserError
from ftlaunch.processes import lock
from ftlaunch.run.layout import RunDir

PACKAGES = (
    "local",
    "slurm",
)
"""The packages of backends. Each chooses in its turn, and may leave a run to those before it."""


def of(run: RunDir) -> Backend:
    """The backend that a run was started by last, or was written for."""
    return _chosen(run, None)


def on(cluster: Cluster | None) -> Backend:
    """The backend of a profile; without one: here, on this machine or, in a job of the user's, on its nodes."""
    return _chosen(None, cluster)


def _chosen(run: RunDir | None, cluster: Cluster | None) -> Backend:
    found: Backend | None = None
    for name in PACKAGES:
        found = import_module(f"ftlaunch.backend.{name}").choose(run, cluster, found)
    assert found is not None
    return found


def driven(run: RunDir) -> Driven:
    """The backend of a run that is driven from here. UserError where the run is a cluster's."""
    backend = of(run)
    if not isinstance(backend, Driven):
        raise UserError(f"{run.path} is a cluster's to run", f"{NAME_ONE}; or name another folder with --dir")
    return backend


def claim(run: RunDir, backend: Backend, source: Path | None = None) -> None:
    """Note in a run's folder that the run goes on by a backend from here; see `Backend.claim`."""
    before = of(run)
    backend.claim(run, source)
    if type(before) is not type(backend):
        before.release(run)


def move(run: RunDir, backend: Backend) -> None:
    """Have a run that is at rest go on elsewhere. UserError where it is being driven or submitted."""
    # A driver on this machine and a submission both hold the lock while they rely on these files.
    with lock.hold(run):
        claim(run, backend)
