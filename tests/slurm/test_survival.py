"""What a run on a real SLURM cluster lives through, and what it does not try again."""

import json
import os
import signal
import subprocess
import sys
import time
from bisect import bisect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scheduled import ScriptedRun, devcluster, slurm

from ftlaunch.backend import control
from ftlaunch.backend.slurm import restart_policy
from ftlaunch.run.files import read_jsonl

Submit = Callable[..., ScriptedRun]
STATE = Path("/tmp/ftlaunch-devcluster")


@pytest.fixture
def heal() -> Iterator[None]:
    """Have the cluster whole again afterwards."""
    yield
    done = devcluster("up")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def crowd(act_together: Submit) -> dict[str, ScriptedRun]:
    """Runs that work side by side, as nothing that happens to one reaches another."""
    return {
        "killed": act_together("40 0.05 kill@25", nodes=2, name="killed"),
        "stopped": act_together("40 0.05 hang@25", nodes=2, name="stopped", hang_after=5),
        "twice": act_together("40 0.05 kill@25!", nodes=2, name="twice"),
        "limited": act_together("3000 0.3 none", nodes=2, name="limited", time_limit="0:01:30", signal_lead=30),
    }


def test_a_killed_rank_costs_a_restart(crowd: dict[str, ScriptedRun]) -> None:
    scripted = crowd["killed"]
    assert scripted.wait_for_end().state == "done"
    first, second = scripted.ended()
    assert (first["cause"], first["restarted"], first["checkpoint"][-4:]) == ("failed", True, "0020")
    assert second["cause"] == "done"
    assert scripted.is_calm()


def test_a_stopped_rank_is_named_and_costs_a_restart(crowd: dict[str, ScriptedRun]) -> None:
    scripted = crowd["stopped"]
    assert scripted.wait_for_end().state == "done"
    first, second = scripted.ended()
    assert (first["cause"], first["restarted"], second["cause"]) == ("failed", True, "done")
    told = json.loads((scripted.run.stage_dir("01-sft").attempts / "1/error.json").read_text())
    assert told["message"].endswith("rank 1 on n2 is stopped by a signal")
    assert "Current thread" in (scripted.run.stage_dir("01-sft").attempts / "1/rank0.log").read_text()
    assert scripted.is_calm()


def test_the_same_failure_twice_is_final(crowd: dict[str, ScriptedRun]) -> None:
    scripted = crowd["twice"]
    status = scripted.wait_for_end()
    assert status.state == "failed"
    assert "SIGKILL" in (status.stages[0].note or "")
    assert [ended["restarted"] for ended in scripted.ended()] == [True, False]
    assert "failed twice at the same place" in scripted.ended()[-1]["reason"]


def test_tasks_that_are_killed_leave_a_job_that_goes_on(act: Submit) -> None:
    """As srun kills them where it has lost a node that SLURM itself does not give up; before that, a rank dies.

    With -s, `make restarts` prints what each costs: the one is started again in place, the other from the queue.
    """
    scripted = act("60 0.1 kill@15", nodes=2)
    scripted.wait_for_step(25)
    scripted.signal_task(0, signal.SIGKILL)
    assert scripted.wait_for_end().state == "done"
    assert [(ended["cause"], ended["in_place"]) for ended in scripted.ended()] == [
        ("failed", True),
        ("failed", False),
        ("done", False),
    ]
    in_place, queued = pauses(scripted)
    print(f"\nfrom a death to the next step: {in_place:.1f} s in place, {queued:.1f} s by way of the queue")
    assert scripted.is_calm()


def pauses(scripted: ScriptedRun) -> list[float]:
    """Seconds from the last step of each attempt to the first of the next."""
    stage_dir = scripted.run.stage_dir("01-sft")
    times = [entry["time"] for entry in read_jsonl(stage_dir.metrics)]
    starts = [attempt.process.stat().st_mtime for attempt in stage_dir.all_attempts()]
    return [times[at] - times[at - 1] for start in starts[1:] for at in [bisect(times, start)]]


def test_tasks_that_are_warned_before_they_can_listen_cost_a_start(act: Submit, tmp_path: Path) -> None:
    """SLURM may send its signal a minute early, and Python takes its time to start on a cold file system."""
    python = tmp_path / "python"
    warned = """case "$SLURM_RESTART_COUNT $*" in " "*submitit*) kill -USR2 $$ ;; esac"""
    python.write_text(f'#!/bin/sh\n{warned}\nexec {sys.executable} "$@"\n')
    python.chmod(0o700)
    scripted = act("5 0.1 none", nodes=2, python=str(python))
    assert scripted.wait_for_end().state == "done"
    assert [(ended["cause"], ended["restarted"]) for ended in scripted.ended()] == [
        ("preempted", True),
        ("done", False),
    ]


def test_a_requeued_job_goes_on_from_its_checkpoint(act: Submit) -> None:
    scripted = act("40 0.1 none", nodes=2)
    scripted.wait_for_step(12)
    slurm("scontrol", "requeue", scripted.job)
    assert scripted.wait_for_end().state == "done"
    assert [ended["cause"] for ended in scripted.ended()] == ["preempted", "done"]
    assert scripted.ended()[0]["step"] > 12
    assert scripted.is_calm()


def test_it_saves_and_goes_on_when_the_time_limit_is_near(crowd: dict[str, ScriptedRun]) -> None:
    scripted = crowd["limited"]
    scripted.wait(lambda status: status.stages[0].attempts > 1, 180)
    first = scripted.ended()[0]
    assert (first["cause"], first["restarted"]) == ("preempted", True)
    assert Path(first["checkpoint"]).name == f"step-{first['step']:08d}"
    scripted.wait_for_step(first["step"] + 1)
    assert control.cancel(scripted.run)


def test_a_short_job_preempted_again_and_again_still_finishes(act: Submit) -> None:
    """More often than a job may be that makes no checkpoint."""
    scripted = act("80 0.1 none", nodes=3)
    before = 0
    for _ in range(restart_policy.FRUITLESS + 1):
        scripted.wait_for_step(before + 2)
        slurm("srun", "--partition=urgent", "--nodes=3", "--exclusive", "true")
        before = scripted.status.stages[0].step
    assert scripted.wait_for_end().state == "done"
    assert [ended["cause"] for ended in scripted.ended()] == ["preempted"] * (restart_policy.FRUITLESS + 1) + ["done"]
    assert scripted.is_calm()


@pytest.mark.usefixtures("heal")
def test_a_controller_that_is_away_for_a_while_is_waited_for(act: Submit) -> None:
    """By a job that wants to go back into the queue meanwhile, as it was warned of its end."""
    scripted = act("40 0.1 none", "3 0.1 none", nodes=2)
    scripted.wait_for_step(12)
    controller = _daemon("slurmctld")
    os.kill(controller, signal.SIGTERM)
    while Path(f"/proc/{controller}").exists():
        time.sleep(0.1)
    scripted.signal_task(0, signal.SIGUSR2)
    while not scripted.ended()[0]:  # written first of all, whether or not the controller is there
        time.sleep(0.5)
    time.sleep(3)
    assert [ended["restarted"] for ended in scripted.ended()] == [True]
    devcluster("up")
    assert scripted.wait_for_end(150).state == "done"
    assert [ended["restarted"] for ended in scripted.ended()] == [True, False]
    assert scripted.is_calm()
    assert scripted.is_calm("02-sft")


@pytest.mark.usefixtures("heal")
def test_a_dead_node_is_replaced(act: Submit) -> None:
    scripted = act("60 0.1 none", nodes=2)
    scripted.wait_for_step(12)
    assert scripted.status.stages[0].nodes == "n[1-2]"
    os.kill(_daemon("n1"), signal.SIGKILL)  # the first one, which would say how the attempt ended
    assert scripted.wait_for_end(150).state == "done"
    first, second = scripted.ended()
    assert (first["cause"], first["lost"], second["nodes"]) == ("lost", ["n1"], ["n2", "n3"])
    assert first["reason"].startswith("no word from n1: lost, ")
    assert scripted.is_calm()


@pytest.mark.usefixtures("heal")
def test_a_node_without_network_is_replaced(act: Submit) -> None:
    scripted = act("60 0.1 none", nodes=2)
    scripted.wait_for_step(12)
    assert scripted.status.stages[0].nodes == "n[1-2]"
    subprocess.run(["ip", "link", "set", "ftl-n2", "down"], check=True)
    assert scripted.wait_for_end(150).state == "done"
    assert scripted.ended()[-1]["nodes"] == ["n1", "n3"]
    assert scripted.is_calm()


def _daemon(name: str) -> int:
    return json.loads(devcluster("status").stdout)["daemons"][name]
