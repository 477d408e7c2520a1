"""A cluster that keeps accounts: all that goes without them goes with them, and they hold no secret."""

from collections.abc import Callable, Iterator

import pytest
from scheduled import ScriptedRun, devcluster, slurm

from ftlaunch.backend.slurm import queue
from ftlaunch.backend.slurm.doctor import examine
from ftlaunch.cluster.vocabulary import Cluster

Submit = Callable[..., ScriptedRun]
CANARY = "canary-in-a-coal-mine"


@pytest.fixture
def accounts(dev: Cluster) -> Iterator[Cluster]:
    """The cluster, started again with slurmdbd; without it afterwards."""
    done = devcluster("up", "--accounting")
    assert done.returncode == 0, done.stderr
    yield dev
    devcluster("up", "--no-accounting")


def test_a_run_is_known_to_the_accounts_and_its_secrets_are_not(
    accounts: Cluster, act: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "MY_PASSWORD"):
        monkeypatch.setenv(name, CANARY)
    scripted = act("5 0.1 none", "3 0.1 memory@2", nodes=2)
    status = scripted.wait_for_end()
    assert [stage.state for stage in status.stages] == ["done", "failed"]
    known = scripted.wait_for_accounts()
    assert sorted(entry.state for entry in known.values()) == ["COMPLETED", "FAILED"]
    assert known[scripted.job].nodes == "n[1-2]"
    jobs = f"--jobs={','.join(scripted.jobs)}"
    shown = [slurm("sacct", jobs, *how) for how in (("--format=ALL", "-P"), ("--batch-script",), ("--env-vars",))]
    assert all("01-sft" in text or "SLURM" in text for text in shown)
    assert CANARY not in "".join(shown)
    (accounting,) = [check for check in examine(accounts, nodes=1) if check.what == "accounting"]
    assert accounting.found == "on"
    assert queue.read_queue(scripted.run).keys() == scripted.jobs
