"""What an attempt is said to have died of, by its own job, by the start that follows it, or by nobody yet."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from tests.launcher.scripted_runs import make_plan, write_run

from ftlaunch.backend import runs
from ftlaunch.backend.slurm import causes, jobs, paths
from ftlaunch.backend.slurm.messages import MadeBy, NodeReport
from ftlaunch.backend.slurm.queue import Answer, Entry, Job
from ftlaunch.backend.slurm.restart_policy import read_ended
from ftlaunch.backend.slurm.stage_job import StageJob
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.processes.outcome import Failure, read_failure
from ftlaunch.processes.signals import PreemptionSignals
from ftlaunch.recipe.stages import Parallel
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import Attempt, RunDir

ECHO = Failure(rank=1, type="RuntimeError", message="[gloo] Connection closed by peer [10.0.0.1]:4711", log="l")
KILLED = Failure(rank=3, type="SIGKILL", message="killed by SIGKILL", log="l")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose only stage is job 7 on two nodes."""
    run = write_run(tmp_path / "r", "train")
    planned = make_plan(run.path, "train").stages[0]
    spec = msgspec.structs.replace(planned.spec, parallel=Parallel(nodes=2))
    planned = msgspec.structs.replace(planned, spec=spec)
    write_json(run.plan, msgspec.structs.replace(runs.read_plan(run), stages=[planned]))
    write_json(paths.cluster(run), Cluster())
    write_json(paths.job(run.stage_dir("01-sft")), Job(id="7", submitted=0.0))
    return run


def start(run: RunDir, *nodes: str) -> StageJob:
    slurm: Any = SimpleNamespace(job_id="7", node=0, hostnames=[*nodes])
    return dataclasses.replace(StageJob(run.stage_dir("01-sft"), PreemptionSignals()), slurm=slurm)


def cut_off(run: RunDir) -> Attempt:
    """An attempt whose first node, n1, has died: the rank of the other one says that its peer has gone."""
    attempt = run.stage_dir("01-sft").new_attempt(made_by=start(run, "n1", "n2").made_by)
    write_json(attempt.error, ECHO)
    write_json(paths.report(attempt, 1), NodeReport(exit_code=1, killed=None))
    return attempt


def test_the_next_start_says_which_node_was_lost(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = cut_off(run)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    following = start(run, "n2", "n3")
    run.stage_dir("01-sft").new_attempt(made_by=following.made_by)
    following.finish_killed_job()
    ended, failure = read_ended(attempt), read_failure(attempt)
    assert ended is not None
    assert failure is not None
    assert (ended.job, ended.restart, ended.nodes, ended.cause, ended.restarted) == ("7", 0, ["n1", "n2"], "lost", True)
    assert failure.message.startswith("no word from n1: lost, or ")
    assert failure.message.endswith("; n2 answered; the next start is without n1")
    assert ended.reason == f"{failure.message}; goes on from the newest checkpoint"
    # The first node was only cut off, and comes back. What it says of others is of no use to anybody any more.
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    late = start(run, "n1", "n2")
    late.lost = ["n2"]
    assert not late.conclude(attempt, ECHO).restarted
    assert read_ended(attempt) == ended


def test_what_an_attempt_has_said_itself_is_kept(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    failed, saved = cut_off(run), cut_off(run)
    write_json(failed.error, KILLED)
    write_json(saved.stopped, {"reason": "requeue", "step": 3})
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    start(run, "n2", "n3").finish_killed_job()
    found = [read_ended(attempt) for attempt in (failed, saved)]
    assert [(one.cause, one.reason) for one in found if one] == [
        ("failed", "rank 3: killed by SIGKILL; goes on from the newest checkpoint"),
        ("preempted", "saved; goes on from the newest checkpoint"),
    ]
    assert read_failure(failed) == KILLED


@pytest.mark.parametrize(
    ("state", "stands", "told"),
    [
        ("PENDING", "queued", "waits in the queue; attempt 1 lost: no word from n1"),
        ("NODE_FAIL", "failed", "no word from n1: lost, or all that ran there was killed at once; n2 answered; SLURM"),
        ("RUNNING", "running", None),
    ],
)
def test_a_lost_node_is_told_before_anything_follows(run: RunDir, state: str, stands: str, told: str | None) -> None:
    cut_off(run)
    entry = Entry(id="7", state=state, name="r/01-sft", folder=str(run.path))
    stage = jobs._state_of_run(run, Answer(entries={"7": entry})).stages[0]
    assert stage.state == stands
    assert (stage.note or "").startswith(told or "")
    assert bool(stage.note) is bool(told)
    words = jobs.last_words(run.stage_dir("01-sft"), entry)
    assert (words.type if words else None) == (causes.LOST if told else None)


def test_a_stage_that_goes_on_tells_of_the_attempt_before(run: RunDir) -> None:
    job = start(run, "n1", "n2")
    attempt = run.stage_dir("01-sft").new_attempt(made_by=job.made_by)
    write_json(attempt.process, {})
    ended = job._decide_restart(msgspec.structs.replace(KILLED, rank=1))
    write_json(paths.ended(attempt), ended)
    reason = "rank 1 on n2: killed by SIGKILL; goes on from the newest checkpoint"
    assert (ended.cause, ended.reason) == ("failed", reason)
    run.stage_dir("01-sft").new_attempt(made_by=MadeBy(job="7", restart=1))
    entry = Entry(id="7", state="RUNNING", name="r/01-sft", folder=str(run.path))
    assert jobs._state_of_run(run, Answer(entries={"7": entry})).stages[0].note == f"attempt 1 failed: {reason}"


def test_a_cause_names_rank_and_node() -> None:
    nodes = ["n1", "n2"]
    odd = Failure(rank=2, type="ValueError", message="odd\nand long", log="l")
    assert causes.describe(KILLED, nodes, [], Parallel(nodes=2, procs_per_node=2)) == "rank 3 on n2: killed by SIGKILL"
    assert causes.describe(odd, nodes, ["n1"], Parallel(nodes=2, procs_per_node=2)) == (
        "no word from n1; rank 2 on n2: ValueError: odd"
    )
