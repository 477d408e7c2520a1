"""What `ftlaunch doctor` makes of SLURM's words and of what the nodes have found, and what a node looks at."""

import socket
import sys
import time
from importlib import metadata
from pathlib import Path

import msgspec
import pytest

from ftlaunch.backend.slurm import doctor, probe
from ftlaunch.backend.slurm.probe import Finding
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.run.files import write_json
from ftlaunch.run.provenance import PACKAGES


def command(folder: Path, name: str, script: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o700)


@pytest.fixture
def site(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster whose controller is up and which keeps no accounts."""
    command(slurm, "scontrol", "echo 'Slurmctld(primary) at head is UP'")
    command(slurm, "sinfo", "echo 'slurm 24.05.0'")
    command(slurm, "sacct", "exit 1")
    monkeypatch.chdir(tmp_path)
    return slurm


def test_a_controller_that_is_down_ends_the_examination(site: Path, tmp_path: Path) -> None:
    command(site, "scontrol", "echo 'Slurmctld(primary) at head is DOWN'")
    (check,) = doctor.examine(Cluster(), 1)
    assert (check.what, check.passed) == ("controller", False)
    assert check.found == "slurm 24.05.0: Slurmctld(primary) at head is DOWN"
    assert not [*tmp_path.glob(".ftlaunch-doctor-*")]


def test_a_job_that_slurm_would_refuse_is_not_tried(site: Path) -> None:
    (site / "refused").write_text("0")
    controller, accounting, admitted = doctor.examine(Cluster(account="nobody"), 1)
    assert (controller.passed, accounting.passed, admitted.passed) == (True, True, False)
    assert accounting.found.startswith("off")
    assert "Invalid account" in admitted.found
    assert admitted.remedy


def test_a_slurm_that_is_not_there_is_a_check_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    (check,) = doctor.examine(Cluster(), 1)
    assert (check.what, check.found) == ("SLURM", "scontrol is not installed here")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def finding(**changed: object) -> Finding:
    fit = Finding(
        node="n1",
        python=sys.version.split()[0],
        packages={name: _version(name) for name in PACKAGES},
        shared=True,
        time=time.time(),
        free_bytes=100 << 30,
        scontrol=True,
        gpus=["H200, 570.1"],
        meets=None,
        reduced="nccl, 2 ms for a million floats",
        reduces=True,
    )
    return msgspec.structs.replace(fit, **changed)


def failing(found: Finding, skew: float = 0.0, cluster: Cluster | None = None) -> list[str]:
    checks = doctor._node(found, skew, cluster or Cluster())
    return [f"{check.what}: {check.found}" for check in checks if not check.passed]


def test_a_node_that_is_fit_passes() -> None:
    assert failing(finding()) == []


@pytest.mark.parametrize(
    ("changed", "skew", "said"),
    [
        ({"shared": False}, 0.0, "n1: shared folder: not seen"),
        ({"meets": "no route to host"}, 0.0, "n1: first node reachable: no route to host"),
        ({"free_bytes": 3 << 30}, 0.0, "n1: disk: 3 GiB free"),
        ({"gpus": []}, 0.0, "n1: GPU: 0 seen"),
        ({"python": "3.9.1"}, 0.0, f"n1: python and packages: python 3.9.1, here {sys.version.split()[0]}"),
        ({}, 31.0, "n1: clock: 31.0 s from the file system's"),
    ],
)
def test_a_node_that_is_not_fit_is_told_by_what_it_lacks(changed: dict[str, object], skew: float, said: str) -> None:
    assert failing(finding(**changed), skew) == [said]


def test_a_cluster_without_gpus_misses_none() -> None:
    assert failing(finding(gpus=[]), cluster=Cluster(gpus="none")) == []


def test_nodes_meet_where_the_first_one_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        write_json(tmp_path / probe.HEAD, server.getsockname())
        probe._knock(tmp_path)
    monkeypatch.setattr(probe, "MEET_SECONDS", 0.2)
    with pytest.raises(ConnectionRefusedError):
        probe._knock(tmp_path)
