"""How runs stand, whichever backend they are of."""

from collections.abc import Sequence
from pathlib import Path

from ftlaunch.backend import backends
from ftlaunch.backend.protocol import Backend
from ftlaunch.backend.status import RunStatus
from ftlaunch.run.layout import RunDir


def read_all(every: Sequence[RunDir]) -> list[RunStatus]:
    """How runs stand, in their order; each backend is asked once for all of its own."""
    kinds: dict[type, tuple[Backend, list[RunDir]]] = {}
    for run in every:
        backend = backends.of(run)
        # Any backend answers for all runs of its kind, so squeue is called once and not once a run.
        kinds.setdefault(type(backend), (backend, []))[1].append(run)
    found: dict[Path, RunStatus] = {}
    for backend, its in kinds.values():
        found |= {run.path: status for run, status in zip(its, backend.states(its), strict=True)}
    return [found[run.path] for run in every]


def read_status(run: RunDir) -> RunStatus:
    """How a run and its stages stand now."""
    return read_all([run])[0]
