"""Sites as they are: what is odd, slow, silent or cut short loses nothing, orphans nothing, and has a cause."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from scheduled import ROOT, ScriptedRun, devcluster, slurm, write_scripted

from ftlaunch.backend import control, runs
from ftlaunch.backend.slurm import paths, queue, submit
from ftlaunch.backend.slurm.queue import Job
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import UserError
from ftlaunch.recipe.stages import Parallel
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import RunDir
from ftlaunch.watch import logs

Submit = Callable[..., ScriptedRun]


def ftlaunch(*words: str | Path, path: Path | None = None) -> subprocess.Popen[str]:
    """The command line, in a session of its own, with a folder of other programs in front."""
    variables = os.environ | {"PATH": f"{path}:{os.environ['PATH']}"} if path else os.environ
    command = [sys.executable, "-m", "ftlaunch", *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=variables, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def call(*words: str | Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    process = ftlaunch(*words, path=path)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def site_sbatch(folder: Path, before: str, after: str = "") -> Path:
    """A site's own sbatch in a folder: lines of a shell around the real one."""
    folder.mkdir(exist_ok=True)
    file = folder / "sbatch"
    file.write_text(f'#!/bin/sh\n{before}\n{shutil.which("sbatch")} "$@"; code=$?\n{after}\nexit $code\n')
    file.chmod(0o700)
    return folder


def in_queue(run_dir: Path) -> set[str]:
    """Ids of jobs that wait or run in a run's folder, asked without ftlaunch."""
    rows = slurm("squeue", "--noheader", "--format=%i %Z").splitlines()
    return {row.split(" ", 1)[0] for row in rows if row.split(" ", 1)[1] == str(run_dir)}


def wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.3)


@pytest.fixture
def cleared() -> Iterator[list[Path]]:
    """Folders of runs whose jobs are ended afterwards."""
    folders: list[Path] = []
    yield folders
    for folder in folders:
        slurm("scancel", "--signal=KILL", "--full", *in_queue(folder))
        slurm("scancel", *in_queue(folder))


@pytest.fixture(scope="module")
def crowd(act_together: Submit) -> dict[str, ScriptedRun]:
    """Runs that fail for reasons of their site, side by side."""
    two = {"nodes": 2}
    return {
        "interface": act_together("5 0.1 none", "3 0.1 none", name="interface", interface="ib0", **two),
        "exit": act_together("5 0.1 none", name="exit", setup=["exit 3"]),
        "module": act_together("5 0.1 none", name="module", setup=["nosuch load cuda"]),
        "python": act_together("5 0.1 none", name="python", python="/opt/none/bin/python"),
        "never": act_together("5 0.1 none", name="never", time_limit="3-00:00:00"),
        "in place": act_together("30 0.05 kill@15", name="in-place", **two),
    }


def test_a_rank_that_dies_is_started_again_inside_the_job(crowd: dict[str, ScriptedRun]) -> None:
    scripted = crowd["in place"]
    assert scripted.wait_for_end().state == "done"
    first, second = scripted.ended()
    assert (first["restarted"], first["in_place"], second["restart"]) == (True, True, 1)
    assert (first["job"], first["nodes"]) == (second["job"], second["nodes"])
    assert slurm("scontrol", "show", "job", scripted.job).partition("Restarts=")[2].startswith("0 ")
    assert scripted.is_calm()


def test_what_keeps_nodes_from_meeting_is_told(crowd: dict[str, ScriptedRun]) -> None:
    scripted = crowd["interface"]
    status = scripted.wait_for_end()
    assert (status.state, status.stages[0].note) == ("failed", "there is no interface ib0 with an address here")
    assert status.stages[0].attempts == 1
    assert logs.first_error(scripted.run, None, None).remedy == "correct `interface`"
    assert (status.stages[1].state, status.stages[1].note) == ("cancelled", "with 01-sft")


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("exit", "ftlaunch: setup ended the job with exit code 3 at: exit 3"),
        ("module", "ftlaunch: setup ended the job with exit code 127 at: nosuch load cuda"),
        ("python", "No such file or directory"),
    ],
)
def test_what_ends_a_job_before_python_starts_is_told(crowd: dict[str, ScriptedRun], name: str, cause: str) -> None:
    scripted = crowd[name]
    status = scripted.wait_for_end()
    assert status.state == "failed"
    assert cause in (status.stages[0].note or "")
    error = logs.first_error(scripted.run, None, None)
    assert cause in error.message
    assert cause in Path(error.log).read_text()
    assert any(cause in line for line in logs.read(scripted.run, None, None, None))


def test_a_job_that_never_starts_is_told(crowd: dict[str, ScriptedRun]) -> None:
    status = crowd["never"].wait(lambda status: status.stages[0].note is not None)
    assert (status.stages[0].note or "").startswith("will not start as it is: PartitionTimeLimit")
    assert control.cancel(crowd["never"].run)
    assert crowd["never"].wait_for_end().stages[0].note == "as asked"
    assert crowd["never"].status.state == "cancelled"


def test_a_rank_is_visited_and_a_run_waits_for_another(
    act: Submit, dev: Cluster, tmp_path: Path, cleared: list[Path]
) -> None:
    scripted = act("900 0.1 none", nodes=2)  # it must still train when the visitor comes, however busy this machine is
    run = write_scripted(tmp_path / "after", ("3 0.1 none",), 1, dev)
    cleared.append(run.path)
    scripted.wait_for_step(2)
    assert call("resume", run.path, "--after", scripted.run.path).returncode == 0
    host = call("attach", scripted.run.path, "--rank", "1", "--", "hostname")
    assert (host.returncode, host.stdout) == (0, "n2\n"), host.stderr
    assert ScriptedRun(run, dev).status.state == "waiting"
    control.ask_to_stop(scripted.run, wait=30)
    assert ScriptedRun(run, dev).wait_for_end().state == "cancelled"  # what it waited for has not succeeded


TOOL = """\
import json, os, pathlib, socket, sys
print(socket.gethostname(), os.getcwd(), json.loads(pathlib.Path(sys.argv[1]).read_text())["text"])
"""
CALL = """\
import sys
from ftlaunch.backend.slurm import tool_job
from ftlaunch.cluster.profiles import load_cluster
from ftlaunch.tools import ToolOptions

class Options(ToolOptions, frozen=True, kw_only=True, tag="stand-in"):
    text: str
    module = '{module}'

sys.exit(tool_job.call(Options(text="a b"), load_cluster({profile!r}, ["environment.PYTHONPATH=."])))
"""


@pytest.mark.usefixtures("dev")
def test_a_tool_answers_from_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tool.py").write_text(TOOL)
    monkeypatch.chdir(tmp_path)
    line = CALL.format(profile=str(ROOT / "slurm/profiles/dev.toml"), module="tool")
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split(" ", 1)[1]) == (0, f"{tmp_path} a b\n"), done.stderr
    assert done.stdout.startswith("n")
    assert {path.name for path in tmp_path.iterdir()} <= {"tool.py", "__pycache__"}
    failing = line.replace("'tool'", "'none_such'")
    done = subprocess.run([sys.executable, "-c", failing], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "No module named none_such" in done.stderr
    (tmp_path / "tool.py").write_text("import time; time.sleep(600)")
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", line], stdout=pipe, stderr=pipe, text=True)
    wait_until(lambda: any(tmp_path.glob(".ftlaunch-tool-*/answer")))
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert "is ended" in err
    assert not any(tmp_path.glob(".ftlaunch-tool-*"))


def test_an_interface_that_one_node_lacks_is_told_with_the_node(act: Submit, tmp_path: Path) -> None:
    python = tmp_path / "python"  # stands for a node whose network is called otherwise
    code = "import ftlaunch.backend.slurm.rendezvous as r; r._interfaces = lambda: {}; "
    code += "import runpy, sys; sys.argv = sys.argv[3:]; runpy.run_module('submitit.core._submit', run_name='__main__')"
    script = f'case "$SLURM_NODEID $*" in "1 "*submitit*) exec {sys.executable} -c "{code}" "$@" ;; esac'
    python.write_text(f'#!/bin/sh\n{script}\nexec {sys.executable} "$@"\n')
    python.chmod(0o700)
    scripted = act("40 0.1 none", nodes=2, interface="eth0", python=str(python))
    status = scripted.wait_for_end()
    assert (status.state, status.stages[0].note) == ("failed", "n2: there is no interface eth0 with an address here")
    assert status.stages[0].attempts == 1


def test_a_job_that_is_not_on_record_leaves_the_others_alone(act: Submit) -> None:
    """As one whose sbatch was believed to have failed: it starts while the run's own job trains."""
    scripted = act("60 0.1 none", nodes=2, constants={"record.RECORD_SECONDS": 2.0})
    scripted.wait_for_step(3)
    (script,) = paths.jobs(scripted.run.stage_dir("01-sft")).glob("*_submission.sh")
    stray = slurm("sbatch", "--parsable", str(script)).strip()
    pickle = next(paths.jobs(scripted.run.stage_dir("01-sft")).glob(f"{scripted.job}_submitted.pkl"))
    shutil.copy(pickle, pickle.with_name(f"{stray}_submitted.pkl"))
    assert stray in queue.read_queue(scripted.run)
    wait_until(lambda: stray not in in_queue(scripted.run.path))
    assert f"job {stray} is not on record" in paths.job_output(scripted.run.stage_dir("01-sft"), stray).read_text()
    assert scripted.wait_for_end().state == "done"
    assert len(scripted.ended()) == 1
    assert scripted.is_calm()


def test_a_strangers_job_of_the_same_id_is_left_alone(act: Submit, tmp_path: Path) -> None:
    scripted = act("3 0.1 none", nodes=1, sbatch={"hold": True})
    assert control.cancel(scripted.run)
    mine = slurm(
        "sbatch", "--parsable", "--hold", "--job-name=mywork", f"--chdir={tmp_path}", "--wrap=sleep 60"
    ).strip()
    write_json(paths.job(scripted.run.stage_dir("01-sft")), Job(id=mine, submitted=0.0))
    assert scripted.status.stages[0].state == "cancelled"
    assert not control.cancel(scripted.run)
    assert mine in {*slurm("squeue", "--noheader", "--format=%i").split()}
    slurm("scancel", mine)


def test_a_job_is_the_runs_whatever_is_done_to_it(act: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renamed, stopped by a signal, hidden by the user's own filters: it is alive, and not submitted again."""
    scripted = act("40 0.1 none")
    scripted.wait_for_step(2)
    slurm("scontrol", "update", f"JobId={scripted.job}", "JobName=mine")
    slurm("scancel", "--signal=STOP", scripted.job)
    monkeypatch.setenv("SQUEUE_PARTITION", "none-such")
    scripted.wait(lambda status: status.state == "suspended")
    with pytest.raises(UserError, match="in the queue already"):
        submit.submit(scripted.run, runs.read_plan(scripted.run))
    slurm("scancel", "--signal=CONT", scripted.job)
    assert scripted.wait_for_end().state == "done"
    assert scripted.is_calm()


def test_a_run_that_is_copied_or_moved_while_it_waits(
    act: Submit, dev: Cluster, tmp_path: Path, cleared: list[Path]
) -> None:
    scripted = act("3 0.1 none", sbatch={"begin": "now+1hour"})
    copy, moved = RunDir(tmp_path / "copy"), RunDir(tmp_path / "moved")
    cleared += [copy.path, moved.path]
    shutil.copytree(scripted.run.path, copy.path)
    assert not control.cancel(copy)
    assert in_queue(scripted.run.path) == scripted.jobs
    write_json(paths.cluster(copy), dev)
    assert call("resume", copy.path).returncode == 0  # a run of its own
    scripted.run.path.rename(moved.path)
    assert call("resume", moved.path).returncode == 2
    assert control.cancel(moved)
    wait_until(lambda: not in_queue(scripted.run.path))
    write_json(paths.cluster(moved), dev)
    assert call("resume", moved.path).returncode == 0
    assert [ScriptedRun(run, dev).wait_for_end().state for run in (copy, moved)] == ["done", "done"]


def test_a_job_that_sbatch_is_not_sure_of_is_not_trained_twice(
    dev: Cluster, tmp_path: Path, cleared: list[Path]
) -> None:
    late = (
        '(sleep 2; {} "$@") > /dev/null 2>&1 &\necho "sbatch: error: Batch job submission failed: Socket timed out on'
    )
    late = late.format(shutil.which("sbatch")) + ' send/recv operation" >&2; exit 1'
    run = write_scripted(tmp_path / "unsure", ("3 0.1 none",), 1, dev)
    cleared.append(run.path)
    done = call("resume", run.path, path=site_sbatch(tmp_path / "bin", late))
    assert (done.returncode, "a job that was taken all the same" in done.stderr) == (2, True)
    wait_until(lambda: bool(in_queue(run.path)))
    wait_until(lambda: call("resume", run.path).returncode == 0)
    scripted = ScriptedRun(run, dev)
    assert scripted.wait_for_end().state == "done"
    assert len(scripted.ended()) == 1


def test_a_run_of_another_cluster_is_not_judged_by_this_one(act: Submit) -> None:
    scripted = act("3 0.1 none", sbatch={"hold": True})
    slurm("scancel", scripted.job)
    write_json(paths.job(scripted.run.stage_dir("01-sft")), Job(id="9999999", submitted=0.0))
    record = queue.read_submission(scripted.run)
    assert record is not None
    write_json(paths.submission(scripted.run), msgspec.structs.replace(record, cluster="alpha"))
    wait_until(lambda: not in_queue(scripted.run.path))
    stage = scripted.status.stages[0]
    assert (stage.state, stage.note) == ("unknown", "it was submitted on cluster alpha, and this is dev")
    with pytest.raises(UserError, match="alpha"):
        submit.submit(scripted.run, runs.read_plan(scripted.run))


def test_the_id_is_found_among_a_sites_own_lines(dev: Cluster, tmp_path: Path, cleared: list[Path]) -> None:
    banner = "echo 'sbatch: warning: job 4711 is what the site says'\necho '*** batch job 12 hours limit ***'"
    banner += "\nprintf 'sch\\374n, 4712\\n'\nprintf 'gr\\374n 4713\\n' >&2"  # in another encoding
    site = site_sbatch(tmp_path / "bin", banner, "echo '*** bye ***'")
    run = write_scripted(tmp_path / "banner", ("3 0.1 none", "3 0.1 none"), 1, dev)
    cleared.append(run.path)
    done = call("resume", run.path, path=site)
    assert done.returncode == 0, done.stderr
    scripted = ScriptedRun(run, dev)
    assert scripted.jobs == in_queue(run.path)
    assert scripted.wait_for_end().state == "done"


def test_a_job_that_a_site_submits_as_a_renamed_copy_is_refused_and_taken_back(
    dev: Cluster, tmp_path: Path, cleared: list[Path]
) -> None:
    """Nobody would know it later on. It goes by where it writes to, as the id alone may be a stranger's."""
    site = site_sbatch(tmp_path / "bin", 'for last; do :; done; exec < "$last"; set -- --parsable --hold --job-name=x')
    run = write_scripted(tmp_path / "renamed", ("3 0.1 none",), 1, dev)
    cleared.append(run.path)
    done = call("resume", run.path, path=site)
    assert (done.returncode, "as the run's, though sbatch has told so" in done.stderr) == (2, True), done.stderr
    wait_until(lambda: not in_queue(run.path), 20)


def test_a_refused_run_leaves_nothing_and_says_what_works(dev: Cluster, tmp_path: Path) -> None:
    run = write_scripted(tmp_path / "refused", ("3 0.1 none",), 1, msgspec.structs.replace(dev, partition="none-such"))
    done = call("resume", run.path)
    assert done.returncode == 2
    assert done.stderr.count("invalid partition specified") == 1
    assert "--cluster NAME" in done.stderr
    assert not paths.submission(run).exists()
    silent = site_sbatch(tmp_path / "bin", "exit 0")  # says nothing, and does nothing
    done = call("resume", run.path, path=silent)
    assert (done.returncode, "it has told no job id" in done.stderr) == (2, True)


def test_a_chain_that_is_longer_than_the_queue_takes_goes_on_by_itself(
    dev: Cluster, tmp_path: Path, cleared: list[Path]
) -> None:
    words = "QOSMaxSubmitJobPerUserLimit\\nsbatch: error: Batch job submission failed: Job violates accounting policy"
    count = f"squeue -h -o %Z | grep -c '^{tmp_path}/long$'"
    site = site_sbatch(
        tmp_path / "bin", f'[ "$({count})" -lt 2 ] || {{ printf "sbatch: error: {words}" >&2; exit 1; }}'
    )
    run = write_scripted(tmp_path / "long", ("5 0.1 none",) * 4, 1, dev)
    cleared.append(run.path)
    done = call("resume", run.path, path=site)
    assert done.returncode == 0, done.stderr
    assert "03-sft is submitted once" in done.stderr
    scripted = ScriptedRun(run, dev)
    wait_until(lambda: all(stage_dir.result.exists() for stage_dir in run.stage_dirs()), 120)
    assert [len(scripted.ended(stage_dir.name)) for stage_dir in run.stage_dirs()] == [1, 1, 1, 1]


def test_a_chain_goes_on_where_the_queue_takes_one_job(dev: Cluster, tmp_path: Path, cleared: list[Path]) -> None:
    """In that job, which also comes back from the queue to the stage that it was at, and has nodes to spare by then."""
    words = "QOSMaxSubmitJobPerUserLimit\\nsbatch: error: Batch job submission failed: Job violates accounting policy"
    count = f"squeue -h -o %Z | grep -c '^{tmp_path}/one$'"
    site = site_sbatch(tmp_path / "bin", f'[ "$({count})" = 0 ] || {{ printf "sbatch: error: {words}" >&2; exit 1; }}')
    run = write_scripted(tmp_path / "one", ("5 0.1 none", "40 0.1 none", "5 0.1 kill@3"), 2, dev)
    plan = runs.read_plan(run)
    last = msgspec.structs.replace(plan.stages[2].spec, parallel=Parallel(nodes=1), world_size=1)
    files = {"step.json": msgspec.json.encode(last).decode()}
    stages = [*plan.stages[:2], msgspec.structs.replace(plan.stages[2], spec=last, files=files)]
    write_json(run.plan, msgspec.structs.replace(plan, stages=stages))
    cleared.append(run.path)
    done = call("resume", run.path, path=site)
    assert done.returncode == 0, done.stderr
    scripted = ScriptedRun(run, dev)
    scripted.wait(lambda status: (status.stages[1].step or 0) >= 12)
    assert (scripted.status.stages[1].state, scripted.status.stages[1].job) == ("running", scripted.job)
    slurm("scontrol", "requeue", scripted.job)
    assert scripted.wait_for_end().state == "done", scripted.told()
    ended = [scripted.ended(stage_dir.name) for stage_dir in run.stage_dirs()]
    assert [[one["cause"] for one in stage] for stage in ended] == [["done"], ["preempted", "done"], ["failed", "done"]]
    assert {one["job"] for stage in ended for one in stage} == {scripted.job}
    assert all(scripted.is_calm(stage_dir.name) for stage_dir in run.stage_dirs())


def test_a_full_disk_in_the_middle_leaves_no_job(
    dev: Cluster, tmp_path: Path, cleared: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_scripted(tmp_path / "full", ("3 0.1 none", "3 0.1 none"), 1, dev)
    cleared.append(run.path)

    def write(path: Path, value: object) -> None:
        if path == paths.job(run.stage_dir("02-sft")):
            raise OSError(28, "No space left on device")
        write_json(path, value)

    monkeypatch.setattr(submit, "write_json", write)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        submit.submit(run, runs.read_plan(run))
    wait_until(lambda: not in_queue(run.path), 20)
    assert not paths.submission(run).exists()


@pytest.fixture
def heal() -> Iterator[None]:
    yield
    assert devcluster("up").returncode == 0


@pytest.mark.usefixtures("heal")
def test_nothing_waits_for_a_controller_that_is_away(act: Submit) -> None:
    """Status tells what the folder knows, a rank that dies is started again, and stop is heard."""
    scripted = act("400 0.1 kill@25", "3 0.1 none", nodes=2)
    scripted.wait_for_step(12)
    slurm("scontrol", "shutdown", "slurmctld")
    wait_until(lambda: "slurmctld" not in devcluster("status").stdout)
    wait_until(lambda: len(scripted.ended()) == 2)
    assert scripted.ended()[0]["in_place"]
    stage = scripted.status.stages[0]
    assert (stage.state, stage.step is not None, stage.checkpoint is not None) == ("unknown", True, True)
    assert (stage.note or "").startswith("SLURM does not answer: squeue failed")
    with pytest.raises(UserError, match="saves and leaves if it runs, but SLURM does not answer"):
        control.ask_to_stop(scripted.run, wait=0)
    wait_until(lambda: bool(scripted.ended()[-1]), 30)
    assert scripted.ended()[-1]["cause"] == "stopped"
    devcluster("up")
    assert scripted.wait_for_end().state == "stopped"
    assert scripted.status.stages[1].state == "cancelled"
