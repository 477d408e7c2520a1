"""What a profile asks for comes true on a real SLURM cluster."""

import signal
from collections.abc import Callable

import pytest
from scheduled import ScriptedRun, slurm

from ftlaunch.backend.slurm import paths

Submit = Callable[..., ScriptedRun]


NOTIFY = 'echo "$FTLAUNCH_STAGE $FTLAUNCH_STATE: $FTLAUNCH_REASON" >> "$FTLAUNCH_RUN/notified"'


@pytest.fixture(scope="module")
def crowd(act_together: Submit) -> dict[str, ScriptedRun]:
    """Runs that work side by side, as none is in another's way."""
    successor = {"nodes": 2, "restart": "successor"}
    return {
        "replaced": act_together("60 0.1 none", "3 0.1 none", name="replaced", **successor),
        "hopeless": act_together("5 0.1 memory@2", "3 0.1 none", name="hopeless", successors=1, **successor),
        "done": act_together("3 0.1 none", "3 0.1 none", name="done", notify=NOTIFY),
        "failing": act_together("5 0.1 error@1", name="failing", notify=NOTIFY),
    }


def queued() -> set[str]:
    """Job ids that SLURM would still do something about."""
    return {*slurm("squeue", "--noheader", "--format=%i").split()}


def test_a_successor_takes_over_where_jobs_are_not_requeued(crowd: dict[str, ScriptedRun]) -> None:
    scripted = crowd["replaced"]
    scripted.wait_for_step(12)
    scripted.signal_task(0, signal.SIGKILL)
    assert scripted.wait_for_end().state == "done"
    first, second = scripted.ended()
    assert (first["job"], first["cause"], first["restarted"]) == (scripted.job, "lost", True)
    assert (second["cause"], second["restart"]) == ("done", 1)
    assert second["job"] != scripted.job
    assert scripted.is_calm("01-sft")
    assert scripted.is_calm("02-sft")


def test_no_successor_tries_again_what_can_only_fail(crowd: dict[str, ScriptedRun]) -> None:
    scripted = crowd["hopeless"]
    status = scripted.wait_for_end(120)
    assert status.state == "failed"
    assert len(scripted.ended()) == 1
    assert not queued() & scripted.jobs


def test_the_line_to_notify_is_run_at_the_end(crowd: dict[str, ScriptedRun]) -> None:
    both = [crowd["done"], crowd["failing"]]
    for scripted in both:
        scripted.wait_for_end()
    told = [(scripted.run.path / "notified").read_text() for scripted in both]
    assert told[0] == "02-sft done: the stage has its result\n"
    assert told[1].startswith("01-sft failed: rank 0 on n")
    assert "; not started again: " in told[1]


def test_jobs_import_the_code_of_their_submission(act: Submit) -> None:
    scripted = act("3 0.1 none", sbatch={"hold": True})
    with (paths.packages(scripted.run) / "ftlaunch/backend/slurm/node_task.py").open("a") as file:
        file.write("print('this is the copy')\n")
    slurm("scontrol", "release", scripted.job)
    assert scripted.wait_for_end().state == "done"
    assert "this is the copy" in scripted.told()


def test_a_node_that_is_not_heard_of_is_left_out(act: Submit) -> None:
    """Its task is stopped, its rank killed: the first node learns of a broken connection, and of nothing else."""
    # The rank dies by itself, long after its task was stopped, so that a busy machine does not change their order.
    scripted = act("90 0.1 kill@80", nodes=2, constants={"node_task.VERDICT_SECONDS": 10.0})
    scripted.wait_for_step(2)
    scripted.signal_task(1, signal.SIGSTOP)
    assert scripted.wait_for_end(150).state == "done"
    first, second = scripted.ended()
    assert (first["lost"], first["restarted"]) == (first["nodes"][1:], True)
    assert first["lost"][0] not in second["nodes"]
    assert scripted.is_calm()
