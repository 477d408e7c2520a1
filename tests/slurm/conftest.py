"""A real SLURM cluster for the tests."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from scheduled import ROOT, ScriptedRun, devcluster, slurm, submit_scripted

from ftlaunch.cluster.profiles import load_cluster
from ftlaunch.cluster.vocabulary import Cluster


@pytest.fixture(scope="session")
def dev() -> Iterator[Cluster]:
    """The profile of a cluster with three nodes; it is left running where it was running before.

    Where none can be had, its tests are skipped with the reason, and fail if FTLAUNCH_TEST_SLURM=must.
    """
    before = json.loads(devcluster("status").stdout)
    if before["up"]:
        assert len(before["nodes"]) >= 3, "the devcluster that runs has fewer than 3 nodes: take it down"
    else:
        devcluster("down")  # also one that was left and does not answer
        started = devcluster("up", "--nodes", "3")
        if started.returncode:
            if os.environ.get("FTLAUNCH_TEST_SLURM") == "must":
                pytest.fail(started.stderr)
            pytest.skip(f"no SLURM cluster can be had here: {started.stderr}")
    yield load_cluster(str(ROOT / "slurm/profiles/dev.toml"))
    if not before["up"]:
        devcluster("down")


Submit = Callable[..., ScriptedRun]


@pytest.fixture
def act(dev: Cluster, tmp_path: Path) -> Iterator[Submit]:
    """Submit a run: `act("40 0.1 none", "5 0.1 kill@3", nodes=2, max_restarts=1)`, a stage for each text."""
    yield from _submitting(dev, tmp_path)


@pytest.fixture(scope="module")
def act_together(dev: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Submit]:
    """The same for runs that several tests look at while they work side by side."""
    yield from _submitting(dev, tmp_path_factory.mktemp("together"))


def _submitting(dev: Cluster, folder: Path) -> Iterator[Submit]:
    made: list[ScriptedRun] = []

    def call(
        *stages: str, nodes: int = 1, name: str = "scripted", constants: dict[str, float] | None = None, **profile: Any
    ) -> ScriptedRun:
        cluster = msgspec.structs.replace(dev, **profile)
        made.append(submit_scripted(folder / name, stages, nodes, cluster, constants))
        return made[-1]

    yield call
    for scripted in made:
        slurm("scancel", "--signal=KILL", "--full", *scripted.jobs)
        slurm("scancel", *scripted.jobs)
