"""A job that has other nodes than it asked for, and one that takes over the stage after its own."""

import dataclasses
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from tests.launcher.scripted_runs import make_plan, write_run

from ftlaunch.backend.slurm import paths, record
from ftlaunch.backend.slurm.node_task import NodeTask
from ftlaunch.backend.slurm.queue import Job, Submission
from ftlaunch.backend.slurm.request import fits_into
from ftlaunch.cluster.vocabulary import Cluster, Resources
from ftlaunch.errors import UserError
from ftlaunch.plan.plan import PlannedStage
from ftlaunch.processes.signals import PreemptionSignals
from ftlaunch.recipe.stages import Parallel
from ftlaunch.run.files import write_json


def on_nodes(planned: PlannedStage, count: int) -> PlannedStage:
    return msgspec.structs.replace(planned, spec=msgspec.structs.replace(planned.spec, parallel=Parallel(nodes=count)))


def test_a_job_that_was_given_fewer_nodes_is_not_started(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train")
    plan = make_plan(run.path, "train")
    write_json(run.plan, msgspec.structs.replace(plan, stages=[on_nodes(plan.stages[0], 2)]))
    write_json(paths.cluster(run), Cluster())
    slurm: Any = SimpleNamespace(job_id="7", node=0, hostnames=["n1"])
    task = dataclasses.replace(NodeTask(run.stage_dir("01-sft"), PreemptionSignals()), slurm=slurm)
    with pytest.raises(UserError, match="the job has 1 of the 2 nodes"):
        task._start(run.stage_dir("01-sft").new_attempt())


def test_a_job_whose_nodes_die_again_and_again_is_not_started_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM puts it back by itself, each time before it could say how it ended."""
    run = write_run(tmp_path / "r", "train")
    write_json(paths.cluster(run), Cluster(max_restarts=3))
    slurm: Any = SimpleNamespace(job_id="7", node=0, hostnames=["n1"])
    for count, told in (("3", None), ("4", "3 restarts are allowed")):
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        task = dataclasses.replace(NodeTask(run.stage_dir("01-sft"), PreemptionSignals()), slurm=slurm)
        attempt = run.stage_dir("01-sft").new_attempt(made_by=task.made_by)
        if told is None:
            assert task._start(attempt).attempt == attempt.number
        else:
            with pytest.raises(UserError, match=told):
                task._start(attempt)


def test_a_job_waits_for_a_submission_that_waits_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has started before the last job was taken, and leaves once the submission gives no sign of life any more."""
    for name, seconds in (("SIGN", 0.05), ("SUBMISSION", 0.5), ("POLL", 0.05)):
        monkeypatch.setattr(record, f"{name}_SECONDS", seconds)
    run = write_run(tmp_path / "r", "train", "train")
    write_json(paths.submission(run), Submission(cluster="alpha", complete=False))
    write_json(paths.job(run.stage_dir("01-sft")), Job(id="7", submitted=0.0))
    answers: list[bool] = []
    job = threading.Thread(target=lambda: answers.append(record.is_on_record(run.stage_dir("01-sft"), "7")))
    with record.signs_of_life(run):
        job.start()
        job.join(2.0)
        assert answers == []
    job.join(30)
    assert answers == [False]


def test_a_job_is_for_the_stage_that_it_has_come_to(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train", "train")
    first, second = run.stage_dirs()
    write_json(paths.job(first), Job(id="7", submitted=0.0))
    write_json(paths.job(second), Job(id="7", submitted=0.0))
    assert record.stage_of(first, "7").name == "01-sft"
    first.result.write_text("{}")
    assert record.stage_of(first, "7").name == "02-sft"
    write_json(paths.job(second), Job(id="8", submitted=0.0))
    assert record.stage_of(first, "7").name == "01-sft"


@pytest.mark.parametrize(
    ("nodes", "cluster", "fits"),
    [
        (1, Cluster(), True),
        (2, Cluster(time_limit="1:00:00"), True),
        (3, Cluster(), False),
        (1, Cluster(stage={"sft": Resources(partition="big"), "merge": Resources(partition="cpu")}), False),
        (1, Cluster(restart="successor"), False),
    ],
)
def test_a_stage_goes_on_in_a_job_that_has_all_it_asks_for(
    tmp_path: Path, nodes: int, cluster: Cluster, *, fits: bool
) -> None:
    now, following = make_plan(tmp_path, "train", "train").stages
    following = msgspec.structs.replace(on_nodes(following, nodes), name="02-merge")
    assert fits_into(following, on_nodes(now, 2), cluster) is fits
