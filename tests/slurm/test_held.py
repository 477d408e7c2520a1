"""Runs on nodes that their user holds: as in a job of their own, without the queue."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from scheduled import ScriptedRun, slurm, write_scripted
from test_untidy import wait_until

from ftlaunch import processes
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.processes import lock
from ftlaunch.run.layout import RunDir


def held(run: RunDir, nodes: int = 2) -> "subprocess.Popen[str]":
    """`ftlaunch resume` within salloc."""
    command = ["salloc", f"--nodes={nodes}", sys.executable, "-m", "ftlaunch", "resume", str(run.path)]
    conf = {"SLURM_CONF": "/tmp/ftlaunch-devcluster/slurm.conf"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=os.environ | conf, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def driver(run: RunDir) -> int:
    """The process that drives a run."""
    who = lock.holder(run)
    assert who is not None
    assert processes.is_alive(who)
    return who.pid


def test_stages_run_on_nodes_that_are_held(dev: Cluster, tmp_path: Path) -> None:
    """Stopped, resumed in a batch script of the user's own, a rank killed on the way."""
    run = write_scripted(tmp_path / "held", ("40 0.1 kill@25", "3 0.1 none"), 2, None)
    scripted = ScriptedRun(run, dev)
    started = held(run)
    scripted.wait_for_step(12)
    os.kill(driver(run), signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    assert (scripted.status.state, scripted.ended()[0]["cause"]) == ("stopped", "stopped")
    line = f"{sys.executable} -m ftlaunch resume {shlex.quote(str(run.path))}"
    told = slurm("sbatch", "--parsable", "--wait", "--nodes=3", f"--output={tmp_path}/out", f"--wrap={line}")
    assert scripted.status.state == "done", (tmp_path / "out").read_text() + told
    # A first attempt that was stopped is followed by one that need not be killed: the fault is of the first only.
    assert [ended["cause"] for ended in scripted.ended()] == ["stopped", "done"]
    assert scripted.is_calm()
    assert scripted.is_calm("02-sft")


def test_a_rank_that_dies_is_started_again_and_nothing_outlives_a_dead_driver(dev: Cluster, tmp_path: Path) -> None:
    run = write_scripted(tmp_path / "killed", ("60 0.1 kill@15",), 2, None)
    scripted = ScriptedRun(run, dev)
    started = held(run)
    wait_until(lambda: len(scripted.ended()) == 2)
    assert scripted.ended()[0]["in_place"]
    scripted.wait_for_step(25)
    os.kill(driver(run), signal.SIGKILL)
    started.communicate(timeout=60)
    again = held(run)
    _, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert scripted.is_calm()


def test_more_nodes_than_are_held_are_refused(tmp_path: Path) -> None:
    run = write_scripted(tmp_path / "wide", ("3 0.1 none",), 3, None)
    _, err = (done := held(run)).communicate(timeout=60)
    assert done.returncode == 2
    assert "the recipe asks for 3 nodes, and you hold 2" in err
