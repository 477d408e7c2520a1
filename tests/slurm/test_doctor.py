"""What is wrong with a cluster is found before a run is."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from ftlaunch.backend.slurm.doctor import Check, examine
from ftlaunch.cluster.profiles import load_cluster
from ftlaunch.cluster.vocabulary import Cluster


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _failed(checks: list[Check]) -> list[Check]:
    """Return what failed, apart from room on the disk: that is this machine's, and test_doctor_on_nodes judges it."""
    return [check for check in checks if not check.passed and not check.what.endswith(": disk")]


def failures(cluster: Cluster, **otherwise: object) -> list[Check]:
    return _failed(list(examine(msgspec.structs.replace(cluster, **otherwise), nodes=3)))


def test_a_sound_cluster_passes_and_nothing_is_left(dev: Cluster, tmp_path: Path) -> None:
    checks = list(examine(dev, nodes=3))
    assert _failed(checks) == []
    assert {check.what.partition(":")[0] for check in checks} >= {"controller", "probe", "n1", "n2", "n3"}
    reduced = [check.found for check in checks if check.what.endswith("all-reduce")]
    assert len(reduced) == 3
    assert all(found.startswith("gloo, ") for found in reduced)
    assert list(tmp_path.iterdir()) == []


def test_what_slurm_refuses_is_told_in_its_words(dev: Cluster) -> None:
    (refused,) = failures(dev, partition="none-such")
    assert refused.what == "partition, account, limits"
    assert "invalid partition specified: none-such" in refused.found


def test_a_network_that_leads_nowhere_is_found_on_each_node(dev: Cluster) -> None:
    found = failures(dev, interface="ib7")
    what = ("first node reachable", "all-reduce")
    assert {check.what for check in found} == {f"n{number}: {one}" for number in (1, 2, 3) for one in what}
    assert "there is no interface ib7 with an address here" in found[0].found


def test_nodes_that_fail_are_left_out_of_the_profile(dev: Cluster, tmp_path: Path) -> None:
    profile = tmp_path / "site.toml"
    profile.write_text(f'slurm_conf = "{dev.slurm_conf}"\npartition = "main"\ngpus = "none"\ninterface = "ib7"\n')
    command = [sys.executable, "-m", "ftlaunch", "doctor", "--cluster", str(profile), "--nodes", "2"]
    done = subprocess.run([*command, "--exclude-failing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert load_cluster(str(profile)).exclude == ["n1", "n2"]


def test_gpus_that_the_site_does_not_have_are_refused_in_its_words(dev: Cluster) -> None:
    (refused,) = failures(dev, gpus="gpus-per-node")
    assert "Invalid generic resource" in refused.found


@pytest.mark.parametrize(
    ("profile", "found"),
    [
        ({"setup": ["exit 3"]}, "setup ended the job with exit code 3"),
        ({"python": "/opt/none/bin/python"}, "/opt/none/bin/python"),
    ],
    ids=["setup", "python"],
)
def test_what_would_end_every_job_is_found(dev: Cluster, profile: dict[str, object], found: str) -> None:
    (refused,) = failures(dev, **profile)
    assert refused.what == "probe"
    assert found in refused.found


def test_a_controller_that_is_not_there(dev: Cluster, tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").write_text("ClusterName=x\nSlurmctldHost=localhost\nSlurmctldPort=9\n")
    assert failures(dev, slurm_conf=str(tmp_path / "slurm.conf"))[0].what == "controller"
