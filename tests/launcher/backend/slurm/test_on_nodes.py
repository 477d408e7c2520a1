"""What runs on a node, or leads there, apart from a stage's own task: tools, shells, nodes that are held."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from tests.launcher.scripted_runs import make_plan, write_run

from ftlaunch.backend import backends, control, runs
from ftlaunch.backend.slurm import attach, held, messages, paths, requeue, tool_job
from ftlaunch.backend.slurm.held import HeldBy
from ftlaunch.backend.slurm.held_task import HeldTask
from ftlaunch.backend.slurm.messages import HeadNotice, MadeBy
from ftlaunch.backend.slurm.queue import SEPARATOR, Job, Submission
from ftlaunch.backend.slurm.restart_policy import AttemptRecord
from ftlaunch.backend.slurm.stage_job import finish_killed_job, notify
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import BAD_INPUT, DONE, STOPPED, UserError
from ftlaunch.processes import identify
from ftlaunch.processes.signals import PreemptionSignals
from ftlaunch.run.files import read_json, write_json
from ftlaunch.run.layout import CANCEL, STOP, RunDir
from ftlaunch.watch.status import read_status


def test_a_shell_is_opened_on_the_node_of_a_rank_at_work(run: RunDir, slurm: Path) -> None:
    stage_dir = run.stage_dir("01-sft")
    with pytest.raises(UserError, match="no job of r trains"):
        attach.command(run, 0, [], terminal=True)
    attempt = stage_dir.new_attempt(made_by=MadeBy(job="100", restart=0))
    backends.of(run).start(run, detach=False, after=None, fresh=False)
    queue = slurm / "queue"
    queue.write_text(queue.read_text().replace("PENDING", "RUNNING", 1))
    write_json(attempt.process, identify(os.getpid()))
    line = attach.command(run, 0, ["top"], terminal=False)
    assert line == [
        "srun",
        "--jobid=100",
        "--overlap",
        "--nodes=1",
        "--ntasks=1",
        "--relative=0",
        f"--chdir={run.path}",
        "top",
    ]
    assert attach.command(run, 0, [], terminal=True)[-3:] == ["--pty", "bash", "-i"]
    with pytest.raises(UserError, match="has no rank 9"):
        attach.command(run, 9, [], terminal=True)


def test_tasks_read_what_the_first_node_says(run: RunDir) -> None:
    stage_dir = run.stage_dir("01-sft")
    paths.jobs(stage_dir).mkdir()
    file = messages.start_file(stage_dir, MadeBy(job="7", restart=2), 1)
    assert file.name == "7.2.1.json"
    notice = HeadNotice(attempt=3, address="10.0.0.1", port=29500)
    write_json(file, notice)
    assert read_json(file, HeadNotice) == notice
    attempt = stage_dir.new_attempt()
    assert messages.read_made_by(attempt) is None
    assert messages.read_verdict(attempt, 0) is None
    maker = MadeBy(job="7", restart=2)
    assert messages.read_made_by(stage_dir.new_attempt(made_by=maker)) == maker


def record(cause: str) -> AttemptRecord:
    return AttemptRecord(
        job="7", restart=0, nodes=["n1"], cause=cause, step=3, checkpoint=None, lost=[], restarted=False, reason="why"
    )


def test_the_profiles_line_is_told_how_a_run_ended(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = tmp_path / "said"
    cluster = Cluster(notify=f'echo "$FTLAUNCH_STAGE $FTLAUNCH_STATE $FTLAUNCH_REASON" >> {said}')
    stage_dir = run.stage_dir("01-sft")
    notify(cluster, stage_dir, record("done"), is_last=False)
    notify(cluster, stage_dir, record("preempted"), is_last=False)
    notify(cluster, stage_dir, record("done"), is_last=True)
    notify(Cluster(), stage_dir, record("failed"), is_last=True)
    assert said.read_text().splitlines() == ["01-sft stopped why", "01-sft done why"]
    notify(Cluster(notify="exit 3"), stage_dir, record("failed"), is_last=True)
    assert "notify: " in capsys.readouterr().err


def test_a_tools_answer_and_exit_code_come_back_from_its_node(run: RunDir, tmp_path: Path) -> None:
    write_json(paths.environment(run), {"PYTHONHASHSEED": "0"})
    write_json(run.path / tool_job.CALLED_IN, str(tmp_path))
    (run.path / tool_job.OPTIONS).write_text("[1, 2]")
    tool_job.run_tool(str(run.path), "json.tool")
    assert json.loads((run.path / tool_job.ANSWER).read_text()) == [1, 2]
    assert json.loads((run.path / tool_job.CODE).read_text()) == 0
    (run.path / tool_job.OPTIONS).write_text("[1, 2")
    tool_job.run_tool(str(run.path), "json.tool")
    assert json.loads((run.path / tool_job.CODE).read_text()) != 0


def test_a_tool_whose_caller_is_dead_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_job, "DEAD_SECONDS", 0.0)
    monkeypatch.setattr(tool_job, "LOOK_SECONDS", 0.02)
    process = subprocess.Popen(["sleep", "60"])
    assert tool_job._attend(process, tmp_path / "alive") == -9


@pytest.fixture
def allocation(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell of salloc with two nodes."""
    scontrol = slurm / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf 'n1\\nn2\\n'\n")
    scontrol.chmod(0o700)
    for name, value in {"JOB_ID": "55", "JOB_NODELIST": "n[1-2]", "JOB_CPUS_PER_NODE": "8,4", "STEP_ID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)


@pytest.mark.usefixtures("allocation")
def test_a_run_goes_on_by_the_nodes_that_are_held(run: RunDir) -> None:
    paths.cluster(run).unlink()
    found = held.allocation()
    assert found == held.Allocation(job="55", nodes=["n1", "n2"], cpus=4)
    backend = backends.driven(run)
    backend.require_nodes(runs.read_plan(run))
    backend.choose_nodes(run)
    assert paths.held(run).exists()
    assert HeldTask(run.stage_dir("01-sft"), PreemptionSignals()).made_by == MadeBy(job="55.3", restart=0, nodes=["n1"])


def test_a_run_leaves_the_nodes_that_were_held(run: RunDir, slurm: Path) -> None:
    assert slurm.exists()
    paths.cluster(run).unlink()
    write_json(paths.held(run), Cluster())
    assert held.is_for(make_plan(run.path, "train")) is None
    backends.driven(run).choose_nodes(run)
    assert not paths.held(run).exists()


def test_a_run_on_held_nodes_is_seen_and_ended_from_elsewhere(
    run: RunDir, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a login node: its driver works in a batch script on a node, whose processes cannot be seen."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    paths.cluster(run).unlink()
    write_json(paths.held(run), Cluster())
    write_json(paths.held_by(run), HeldBy(job="55", nodes="n[1-2]"))
    there = msgspec.structs.replace(identify(os.getpid()), host="n1")
    write_json(run.lock, there)
    stage_dir = run.stage_dir("01-sft")
    attempt = stage_dir.new_attempt(made_by=MadeBy(job="55.0", restart=0, nodes=["n2"]))
    write_json(attempt.process, there)
    row = ["55", "RUNNING", "None", "n[1-2]", "N/A", "bash", "/x", "/x.sh"]
    (slurm / "queue").write_text(SEPARATOR.join(row) + "\n")
    scontrol = (slurm / "scontrol").read_text()
    (slurm / "scontrol").write_text(scontrol.replace("Command={script}", "Command={script}\\n   NodeList={nodes}"))
    stage = read_status(run).stages[0]
    assert (stage.state, stage.job, stage.nodes) == ("running", "55", "n[1-2]")
    with pytest.raises(UserError, match="is already running in job 55"):
        backends.of(run).require_rest(run)
    line = attach.command(run, 0, ["top"], terminal=False)
    assert {"--jobid=55", "--nodelist=n2"} <= {*line}
    assert control.cancel(run)
    assert {one.stop_reason() for one in run.stage_dirs()} == {CANCEL}
    stage_dir.stop.unlink()
    (slurm / "queue").write_text("")
    assert read_status(run).stages[0].state == "interrupted"
    backends.of(run).require_rest(run)
    with pytest.raises(UserError, match="is not running"):
        control.ask_to_stop(run, wait=0)


SRUN = """\
#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
export SLURM_STEP_NODELIST=n1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1
exec "$@"
"""
SCONTROL = """\
#!/bin/sh
for word; do nodes=$word; done
[ "$nodes" = n1 ] && echo n1 || printf 'n1\\nn2\\n'
"""


@pytest.mark.usefixtures("allocation")
@pytest.mark.parametrize(("act", "code", "cause"), [("train", DONE, "done"), ("fail_by_user", BAD_INPUT, "failed")])
def test_a_stage_is_run_by_a_task_on_a_node_that_is_held(
    run: RunDir, slurm: Path, tmp_path: Path, act: str, code: int, cause: str
) -> None:
    for name, script in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (slurm / name).write_text(script)
        (slurm / name).chmod(0o700)
    plan = make_plan(tmp_path / act, act)
    line = [*plan.stages[0].command, "--machine_rank", "0"]
    run = write_run(tmp_path / act, act)
    write_json(run.plan, msgspec.structs.replace(plan, stages=[msgspec.structs.replace(plan.stages[0], command=line)]))
    backends.driven(run).choose_nodes(run)
    assert backends.driven(run).drive(run) == code
    (attempt,) = run.stage_dir("01-sft").all_attempts()
    ended = msgspec.json.decode(paths.ended(attempt).read_bytes(), type=AttemptRecord)
    assert (ended.job, ended.nodes, ended.cause) == ("55.3", ["n1"], cause)


@pytest.mark.usefixtures("allocation")
def test_a_job_that_starts_after_its_run_was_stopped_leaves_at_once(run: RunDir) -> None:
    """It is called as submitit calls it: by the function that the one who submits names."""
    stage_dir = run.stage_dir("01-sft")
    paths.jobs(stage_dir).mkdir()
    write_json(paths.job(stage_dir), Job(id="55", submitted=0.0))
    write_json(paths.submission(run), Submission(cluster=None, complete=True))
    stage_dir.stop.write_text(STOP)
    call = "import sys; from ftlaunch.backend.slurm.entry import run_stage; run_stage(sys.argv[1])"
    node = {f"SLURM_{name}": "0" for name in ("NODEID", "PROCID", "LOCALID")} | {"SLURM_NTASKS": "1"}
    line = [sys.executable, "-c", call, str(stage_dir.path)]
    assert subprocess.run(line, env=os.environ | node, check=False).returncode == STOPPED
    notice = read_json(messages.start_file(stage_dir, MadeBy(job="55", restart=0), 0), HeadNotice)
    assert notice == HeadNotice(attempt=None)  # the other nodes leave, too
    assert not stage_dir.all_attempts()


def test_a_job_whose_tasks_were_killed_is_put_back(
    run: RunDir, slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backends.of(run).start(run, detach=False, after=None, fresh=False)
    queue = slurm / "queue"
    queue.write_text(queue.read_text().replace("PENDING", "RUNNING", 1))
    (slurm / "scontrol").rename(slurm / "told of jobs")
    known = f'"show job"*) exec "{slurm}/told of jobs" "$@"'
    script = f'case "$*" in {known} ;; show*) echo n1 ;; *) echo "$@" >> {slurm}/told ;; esac'
    (slurm / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
    (slurm / "scontrol").chmod(0o700)
    for name, value in {"JOB_ID": "100", "JOB_NODELIST": "n1", "NODEID": "0", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    stage_dir = run.stage_dir("01-sft")
    stage_dir.new_attempt(made_by=MadeBy(job="100", restart=0))
    monkeypatch.setattr(requeue, "LEAVE_SECONDS", 0.0)  # nobody ends this process
    finish_killed_job(stage_dir, 137)
    (attempt,) = stage_dir.all_attempts()
    ended = msgspec.json.decode(paths.ended(attempt).read_bytes(), type=AttemptRecord)
    assert (ended.job, ended.cause, ended.restarted) == ("100", "failed", True)
    assert "requeue 100" in (slurm / "told").read_text()
    assert "its job's output; goes on from the newest checkpoint" in capsys.readouterr().err
