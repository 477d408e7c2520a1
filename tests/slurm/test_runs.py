"""Runs on a real SLURM cluster: submitted, watched, stopped, resumed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from scheduled import ScriptedRun, slurm

from ftlaunch.backend import control, runs
from ftlaunch.backend.slurm import paths, submit
from ftlaunch.backend.slurm.queue import Job
from ftlaunch.backend.slurm.request import request
from ftlaunch.run.files import write_json

Submit = Callable[..., ScriptedRun]


def test_stages_are_jobs_one_after_the_other(act: Submit) -> None:
    scripted = act("5 0.1 none", "3 0.1 none", nodes=2)
    first = scripted.wait(lambda status: status.stages[0].state == "running")
    assert first.stages[0].nodes is not None
    assert first.stages[1].state == "waiting"
    plan = runs.read_plan(scripted.run)
    for planned in plan.stages:
        (submitted,) = paths.jobs(scripted.run.stage_dir(planned.name)).glob("*_submission.sh")
        assert submitted.read_text() == request(plan, planned, scripted.cluster).script
    assert scripted.wait_for_end().state == "done"
    assert scripted.is_calm("01-sft")
    assert scripted.is_calm("02-sft")
    assert [ended["cause"] for ended in scripted.ended()] == ["done"]
    assert len(scripted.ended()[0]["nodes"]) == 2
    scripted.wait_for_report()


def test_two_runs_share_a_node(act: Submit) -> None:
    both = [act("20 0.1 none", nodes=3, name=name) for name in ("a", "b")]
    for scripted in both:
        assert scripted.wait_for_end().state == "done"
        assert scripted.is_calm()


def test_a_failing_stage_takes_those_behind_it_out_of_the_queue(act: Submit) -> None:
    scripted = act("5 0.1 memory@2", "3 0.1 none", nodes=2)
    status = scripted.wait_for_end()
    assert status.state == "failed"
    assert status.stages[0].note == "rank 1: CUDA out of memory"
    assert "ran out of memory" in scripted.ended()[0]["reason"]
    scripted.wait_for_report()
    scripted.wait(lambda status: status.stages[1].state != "waiting")
    assert scripted.job not in slurm("squeue", "--noheader", "--format=%i")


def test_stop_saves_and_resume_goes_on(act: Submit) -> None:
    scripted = act("60 0.1 none", "3 0.1 none", nodes=2)
    scripted.wait_for_step(5)
    assert control.ask_to_stop(scripted.run, wait=30)
    assert [ended["cause"] for ended in scripted.ended()] == ["stopped"]
    assert scripted.status.state == "stopped"
    submit.submit(scripted.run, runs.read_plan(scripted.run))
    assert scripted.wait_for_end().state == "done"
    assert scripted.is_calm()


def test_scancel_saves_and_is_final(act: Submit) -> None:
    scripted = act("600 0.1 none", "3 0.1 none", nodes=2)
    scripted.wait_for_step(5)
    slurm("scancel", scripted.job)
    assert scripted.wait_for_end().state == "stopped"
    (ended,) = scripted.ended()
    assert (ended["cause"], ended["restarted"]) == ("preempted", False)
    assert ended["checkpoint"] is not None


def test_verbs_need_nothing_but_the_folder(act: Submit) -> None:
    """As from a login node of another day: no home, no variables."""
    scripted = act("600 0.1 none", nodes=2)
    scripted.wait_for_step(3)

    def ask(*words: str) -> str:
        bare = ["env", "-i", "HOME=", f"PATH={os.environ['PATH']}", sys.executable, "-m", "ftlaunch"]
        done = subprocess.run([*bare, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    stage = json.loads(ask("status", str(scripted.run.path), "--json"))["stages"][0]
    assert (stage["state"], stage["job"], stage["nodes"]) == ("running", scripted.job, "n[1-2]")
    assert ask("logs", str(scripted.run.path), "--node", "n2") == "[rank 1] goes on after step 0\n"
    ask("stop", str(scripted.run.path), "--wait", "30")
    assert scripted.status.state == "stopped"


def test_no_secret_is_seen_in_a_job(act: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = "canary-in-a-coal-mine"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_PASSWORD", "HF_HUB_TOKEN"):
        monkeypatch.setenv(name, canary)
    scripted = act("20 0.1 none", "3 0.1 none", nodes=2)
    scripted.wait_for_step(3)
    shown = slurm("scontrol", "show", "job", "-dd", scripted.job)
    shown += slurm("scontrol", "write", "batch_script", scripted.job, "-")
    assert scripted.run.path.name in shown
    assert "submitit" in shown
    listed = subprocess.run(["ps", "-A", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert scripted.wait_for_end().state == "done"
    files = [path for path in scripted.run.path.rglob("*") if path.is_file()]
    assert not [path for path in files if canary.encode() in path.read_bytes()]
    assert canary not in shown + listed


def test_without_accounts_a_forgotten_job_is_known_by_its_files(act: Submit) -> None:
    scripted = act("3 0.1 none", "3 0.1 memory@2", nodes=2)
    assert scripted.wait_for_end().state == "failed"
    for stage_dir in scripted.run.stage_dirs():
        write_json(paths.job(stage_dir), Job(id="9999999", submitted=0.0))
    assert [stage.state for stage in scripted.status.stages] == ["done", "failed"]
    assert scripted.status.stages[1].note == "rank 1: CUDA out of memory"


def test_cancel_ends_everything_at_once(act: Submit) -> None:
    scripted = act("600 0.1 none", "3 0.1 none", nodes=2)
    scripted.wait_for_step(5)
    assert control.cancel(scripted.run)
    scripted.wait(lambda status: status.state != "running", 20)
    assert not control.cancel(scripted.run)
