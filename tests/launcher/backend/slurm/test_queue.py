"""What is made of SLURM's words, odd or missing, and of a run's folder: tried with a site's own squeue on the path."""

import shutil
import time
from pathlib import Path

import pytest
from tests.launcher.scripted_runs import write_run

from ftlaunch.backend.slurm import causes, jobs, paths, queue, reasons, submit
from ftlaunch.backend.slurm.messages import MadeBy
from ftlaunch.backend.slurm.queue import Job, Submission
from ftlaunch.backend.slurm.restart_policy import AttemptRecord
from ftlaunch.backend.slurm.stage_job import StageJob
from ftlaunch.backend.status import RunStatus
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import UserError
from ftlaunch.processes.outcome import Failure
from ftlaunch.processes.signals import PreemptionSignals
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import RunDir
from ftlaunch.watch import logs
from ftlaunch.watch.status import read_all, read_status


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run of two stages, jobs 7 and 8 of cluster alpha, where no command of SLURM's is on the path by itself."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/nowhere")
    monkeypatch.setattr(queue, "_UNANSWERED", {})
    (tmp_path / "slurm.conf").write_text("# a site's\nClusterName=alpha\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    run = write_run(tmp_path / "r", "train", "train")
    write_json(paths.cluster(run), Cluster())
    write_json(paths.submission(run), Submission(cluster="alpha", complete=True))
    for name, id in (("01-sft", "7"), ("02-sft", "8")):
        write_json(paths.job(run.stage_dir(name)), Job(id=id, submitted=0.0))
    return run


def shows(folder: Path, state: str = "RUNNING", place: str = "FOLDER") -> None:
    """Have scontrol know job 7, which works in a place, and no other."""
    place = place.replace("FOLDER", str(folder / "r"))
    known = f"JobId=7 JobName=r/01-sft\n   JobState={state} Reason=None Dependency=(null)\n   NodeList=n1"
    known += f"\n   StartTime=Unknown EndTime=Unknown\n   Command=(null)\n   WorkDir={place}"
    unknown = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    file = folder / "bin/scontrol"
    file.write_text(f"#!/bin/sh\n[ $3 = 7 ] || {{ {unknown}; }}\n/bin/cat <<'END'\n*** welcome ***\n{known}\nEND\n")
    file.chmod(0o700)


def says(folder: Path, *lines: str, command: str = "squeue") -> None:
    """Have one of SLURM's commands print lines, and note that it was asked."""
    file = folder / "bin" / command
    text = "\n".join(line.replace("FOLDER", str(folder / "r")) for line in lines)
    text = text.replace("|", queue.SEPARATOR) if command == "squeue" else text
    file.write_text(f"#!/bin/sh\nprintf . >> {folder}/asked\n/bin/cat <<'END'\n{text}\nEND\n")
    file.chmod(0o700)


FIRST = "7|{}|{}|n1|N/A|r/01-sft|FOLDER|FOLDER/01-sft/jobs/7_submission.sh"


def test_a_sites_own_lines_are_passed_over(run: RunDir, tmp_path: Path) -> None:
    says(tmp_path, "*** welcome | to | alpha ***", FIRST.format("RUNNING", "None"), "", "slurm: warning")
    assert [stage.state for stage in read_status(run).stages] == ["running", "waiting"]


def test_an_id_alone_is_no_job_of_the_run(run: RunDir, tmp_path: Path) -> None:
    says(
        tmp_path,
        "7|PENDING|Priority||N/A|mywork|/home/me|/home/me/x.sh",
        "8|RUNNING|None|n1|N/A|r/02-sft|/elsewhere/r|/elsewhere/r/02-sft/jobs/8_submission.sh",
        "9|RUNNING|None|n1|N/A|notes|FOLDER|FOLDER/notes.sh",
        "10|RUNNING|None|n1|N/A|wrap|FOLDER|(null)",
    )
    assert queue.read_queue(run) == {}
    first = read_status(run).stages[0]
    assert (first.state, first.note) == ("interrupted", "SLURM does not know job 7 any more")


def test_a_job_keeps_its_run_under_another_name(run: RunDir, tmp_path: Path) -> None:
    says(tmp_path, FIRST.format("RUNNING", "None").replace("r/01-sft|", "mine|", 1))
    assert [stage.state for stage in read_status(run).stages] == ["running", "waiting"]


@pytest.mark.parametrize("script", ["/tmp/copy.sh", "(null)"])
def test_a_job_keeps_its_run_where_a_site_submits_a_copy_of_its_script(
    run: RunDir, tmp_path: Path, script: str
) -> None:
    says(tmp_path, FIRST.format("RUNNING", "None").replace("FOLDER/01-sft/jobs/7_submission.sh", script))
    assert [stage.state for stage in read_status(run).stages] == ["running", "waiting"]


def test_a_squeue_that_repeats_itself_hides_no_job(run: RunDir, tmp_path: Path) -> None:
    """A site keeps its answers for a minute: it neither knows of a young job nor that one has ended."""
    says(tmp_path)
    shows(tmp_path)
    assert _first(read_status(run)) == ("interrupted", "SLURM does not know job 7 any more")  # it is old
    assert [*queue.read_queue(run)] == ["7"]
    write_json(paths.job(run.stage_dir("01-sft")), Job(id="7", submitted=time.time()))
    assert _first(read_status(run)) == ("running", None)
    with pytest.raises(UserError, match="in the queue already"):
        submit.refuse_twice(run)
    says(tmp_path, FIRST.format("RUNNING", "None"))
    shows(tmp_path, "CANCELLED")
    submit.refuse_twice(run)


def test_a_squeue_that_loses_its_own_error_is_not_believed(run: RunDir, tmp_path: Path) -> None:
    says(tmp_path)
    (tmp_path / "bin/scontrol").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    (tmp_path / "bin/scontrol").chmod(0o700)
    with pytest.raises(UserError, match="Unable to contact"):
        submit.refuse_twice(run)


def test_a_job_keeps_its_run_where_a_site_has_it_work_elsewhere(run: RunDir, tmp_path: Path) -> None:
    says(tmp_path, FIRST.format("RUNNING", "None").replace("|FOLDER|", "|/scratch|"))
    assert [stage.state for stage in read_status(run).stages] == ["running", "waiting"]


def test_a_users_own_filters_hide_no_job(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(tmp_path, FIRST.format("RUNNING", "None"))
    file = tmp_path / "bin/squeue"
    file.write_text(file.read_text().replace("#!/bin/sh\n", '#!/bin/sh\n[ -z "$SQUEUE_PARTITION" ] || exit 0\n'))
    monkeypatch.setenv("SQUEUE_PARTITION", "debug")
    assert [*queue.read_queue(run)] == ["7"]


def test_an_answer_that_breaks_off_is_none(run: RunDir, tmp_path: Path) -> None:
    says(tmp_path, FIRST.format("RUNNING", "None"))
    file = tmp_path / "bin/squeue"
    file.write_text(file.read_text().replace("/bin/cat", "/usr/bin/head -c 60"))
    with pytest.raises(UserError, match="breaks off"):
        queue.read_queue(run)
    assert _first(read_status(run)) == ("unknown", "SLURM does not answer: squeue's answer breaks off")


def test_names_in_another_encoding_are_passed_over(run: RunDir, tmp_path: Path) -> None:
    says(tmp_path, "5|PENDING|Priority||N/A|gr\u00fcn|/home/me|/home/me/x.sh", FIRST.format("RUNNING", "None"))
    file = tmp_path / "bin/squeue"
    file.write_bytes(file.read_text().encode("latin-1"))
    assert [*queue.read_queue(run)] == ["7"]


def test_a_copy_of_a_run_has_no_jobs(run: RunDir, tmp_path: Path) -> None:
    says(tmp_path, FIRST.format("RUNNING", "None"))
    write_json(run.plan, {"run_dir": str(run.path)})
    shutil.copytree(run.path, tmp_path / "copy")
    assert queue.read_queue(RunDir(tmp_path / "copy")) == {}
    assert [*queue.read_queue(run)] == ["7"]
    run.path.rename(tmp_path / "moved")
    assert [*queue.read_queue(RunDir(tmp_path / "moved"))] == ["7"]


def test_a_job_of_the_run_is_found_without_its_id(run: RunDir, tmp_path: Path) -> None:
    says(tmp_path, FIRST.format("RUNNING", "None").replace("7|", "31|"))
    with pytest.raises(UserError, match=r"in the queue already \(job 31\)"):
        submit.refuse_twice(run)


def test_a_job_that_came_after_it_was_taken_back_is_found(run: RunDir, tmp_path: Path) -> None:
    """As an sbatch that was believed to have failed makes one."""
    says(tmp_path, FIRST.format("PENDING", "Resources"))
    paths.submission(run).unlink()
    for stage_dir in run.stage_dirs():
        paths.job(stage_dir).unlink()
    assert queue.read_queue(run) == {}  # nothing was ever submitted, and nobody is asked
    write_json(paths.environment(run), {})
    assert [*queue.read_queue(run)] == ["7"]
    assert _first(read_status(run)) == ("queued", "waits in the queue: Resources")


def test_without_an_answer_the_folder_speaks(run: RunDir, tmp_path: Path) -> None:
    local = write_run(tmp_path / "local", "train")
    finished = write_run(tmp_path / "finished", "train")
    write_json(paths.cluster(finished), Cluster())
    finished.stage_dir("01-sft").result.write_text("{}")
    (first, *_) = (status := {one.name: one for one in read_all([run, local, finished])})["r"].stages
    assert {name: one.state for name, one in status.items()} == {"r": "unknown", "local": "waiting", "finished": "done"}
    assert first.note == "SLURM does not answer: squeue is not installed here"


def test_finished_runs_ask_nobody(run: RunDir, tmp_path: Path) -> None:
    says(tmp_path)
    for stage_dir in run.stage_dirs():
        stage_dir.result.write_text("{}")
    assert [one.state for one in read_all([run])] == ["done"]
    assert not (tmp_path / "asked").exists()


def test_another_clusters_run_is_left_to_it(run: RunDir, tmp_path: Path) -> None:
    says(tmp_path)
    write_json(paths.submission(run), Submission(cluster="beta", complete=True))
    first = read_status(run).stages[0]
    assert (first.state, first.note) == ("unknown", "it was submitted on cluster beta, and this is alpha")


STATES = {
    ("SUSPENDED", "None"): ("suspended", "SLURM has suspended its job, and lets it go on later"),
    ("STOPPED", "None"): ("suspended", "its job was stopped by a signal: scancel --signal=CONT 7"),
    ("SIGNALING", "None"): ("running", None),
    ("SPECIAL_EXIT", "JobHeldUser"): (
        "queued",
        "will not start as it is: SPECIAL_EXIT: somebody put it back and holds it: scontrol release",
    ),
    ("CONFIGURING", "None"): ("queued", "SLURM prepares its nodes: CONFIGURING"),
    ("PENDING", "launch failed requeued held"): (
        "queued",
        "will not start as it is: launch failed requeued held: its nodes could not start it (sinfo"
        " -R tells why), and it is held back: scontrol release",
    ),
    ("PENDING", "None"): ("queued", "waits in the queue"),
    ("PENDING", "Resources"): ("queued", "waits in the queue: Resources"),
    ("PENDING", "Dependency"): ("waiting", None),
    ("TIMEOUT", "None"): ("interrupted", "SLURM ended its job 7: TIMEOUT: its time limit ran out"),
    ("CANCELLED", "DependencyNeverSatisfied"): (
        "cancelled",
        "SLURM ended its job 7: CANCELLED (DependencyNeverSatisfied): the job that it waited for has not succeeded",
    ),
    ("CANCELLED", "Resources"): ("cancelled", "SLURM ended its job 7: CANCELLED"),
}


@pytest.mark.parametrize(("said", "told"), STATES.items(), ids=str)
def test_states_are_told_in_the_users_terms(
    run: RunDir, tmp_path: Path, said: tuple[str, str], told: tuple[str, str | None]
) -> None:
    says(tmp_path, FIRST.format(*said))
    first = read_status(run).stages[0]
    assert (first.state, first.note) == told


@pytest.mark.parametrize(("stop", "state"), [("cancel", "cancelled"), ("asked", "stopped")])
def test_what_the_user_asked_for_is_no_failure(run: RunDir, tmp_path: Path, stop: str, state: str) -> None:
    says(tmp_path, FIRST.format("FAILED", "NonZeroExitCode"))
    run.stage_dir("01-sft").stop.write_text(stop)
    assert read_status(run).state == state


def test_a_run_without_a_job_says_so(run: RunDir, tmp_path: Path) -> None:
    says(tmp_path)
    for stage_dir in run.stage_dirs():
        paths.job(stage_dir).unlink()
    write_json(paths.environment(run), {})
    assert _first(read_status(run)) == ("interrupted", "not submitted")
    write_json(paths.submission(run), Submission(cluster="alpha", complete=False))
    assert _first(read_status(run)) == ("interrupted", "its submission was cut short")


def _first(status: RunStatus) -> tuple[str, str | None]:
    return status.stages[0].state, status.stages[0].note


def test_what_a_job_died_of_is_in_its_output(run: RunDir, tmp_path: Path) -> None:
    says(tmp_path, FIRST.format("FAILED", "NonZeroExitCode"))
    stage_dir = run.stage_dir("01-sft")
    paths.jobs(stage_dir).mkdir()
    said = "/x/python: No module named submitit\nsrun: error: n1: task 0: Exited with exit code 1\n"
    paths.job_output(stage_dir, "7").write_text(said)
    state, note = _first(read_status(run))
    assert state == "failed"
    assert note == "SLURM ended its job 7: FAILED (NonZeroExitCode): /x/python: No module named submitit"
    assert logs.first_error(run, None, None).message == "/x/python: No module named submitit"
    assert next(iter(logs.read(run, None, None, None))) == "[job] /x/python: No module named submitit"


def ended(reason: str) -> AttemptRecord:
    """How an attempt is on record that is not started again."""
    return AttemptRecord(
        job="7",
        restart=0,
        nodes=["n1"],
        cause="failed",
        step=3,
        checkpoint=None,
        lost=[],
        restarted=False,
        reason=reason,
    )


def test_a_site_that_cleans_up_slowly_keeps_no_cause_back(run: RunDir, tmp_path: Path) -> None:
    says(tmp_path, FIRST.format("COMPLETING", "None"))
    attempt = run.stage_dir("01-sft").new_attempt(made_by=MadeBy(job="7", restart=0))
    write_json(attempt.error, Failure(rank=0, type="MemoryError", message="out of memory", log=""))
    assert _first(read_status(run)) == ("running", None)
    write_json(paths.ended(attempt), ended("failed; SLURM sees to the job itself"))
    assert _first(read_status(run)) == ("running", None)  # which SLURM may put back
    write_json(paths.ended(attempt), ended("failed; not started again: it ran out of memory"))
    assert _first(read_status(run)) == ("failed", "rank 0: out of memory")
    with pytest.raises(UserError, match="SLURM still cleans up after it"):
        submit.refuse_twice(run)


@pytest.mark.parametrize(
    ("said", "reason", "told"),
    [
        (("FAILED", "JobLaunchFailure"), "saved; SLURM sees to the job itself", "was killed by a signal"),
        (("FAILED", "NonZeroExitCode"), "saved; not started again: 4 starts in a row", "4 starts in a row"),
        (("DEADLINE", "DeadLine"), "saved; goes on", "its deadline has passed"),
    ],
)
def test_what_stopped_a_stage_that_nobody_asked_to_stop_is_told(
    run: RunDir, tmp_path: Path, said: tuple[str, str], reason: str, told: str
) -> None:
    says(tmp_path, FIRST.format(*said))
    attempt = run.stage_dir("01-sft").new_attempt(made_by=MadeBy(job="7", restart=0))
    write_json(attempt.stopped, {"reason": "asked", "step": 3})
    write_json(paths.ended(attempt), ended(reason))
    state, note = _first(read_status(run))
    assert state == "stopped"
    assert told in (note or "")


def test_a_full_disk_is_told_as_what_a_job_died_of(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its output lies on the same disk, and is empty."""
    for module in (jobs, causes):
        monkeypatch.setattr(module, "why_unwritable", lambda _: "Disk quota exceeded")
    says(tmp_path, FIRST.format("FAILED", "NonZeroExitCode"))
    told = f"{run.path}/01-sft cannot be written: Disk quota exceeded"
    assert _first(read_status(run)) == ("failed", f"SLURM ended its job 7: FAILED (NonZeroExitCode): {told}")
    assert logs.first_error(run, None, None).message == told
    run.stage_dir("01-sft").new_attempt(made_by=MadeBy(job="7", restart=0))
    told = f"{run.path}/01-sft/attempts/1 cannot be written: Disk quota exceeded"
    assert _first(read_status(run)) == ("failed", f"SLURM ended its job 7: FAILED (NonZeroExitCode); {told}")
    assert logs.first_error(run, None, None).message == told


def test_a_dead_job_concludes_its_own_attempts_only(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM gives the id again, or a job comes back late, while another trains."""
    monkeypatch.setenv("SLURM_JOB_ID", "36")
    monkeypatch.setattr("ftlaunch.backend.slurm.record.RECORD_SECONDS", 0.0)
    stage_dir = run.stage_dir("01-sft")
    other = stage_dir.new_attempt(made_by=MadeBy(job="7", restart=0))
    assert StageJob(stage_dir, PreemptionSignals()).cut_off(137) is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    job = StageJob(stage_dir, PreemptionSignals())
    found = job.cut_off(137)
    assert found is not None
    assert found.number == other.number + 1  # of its own restart, which had not come to one
    write_json(paths.ended(found), {})
    assert job.cut_off(137) is None
    # SLURM has lost its state, counts from the start, and the stage has a job of the same id again.
    write_json(paths.job(stage_dir), Job(id="7", submitted=0.0, earlier=found.number))
    again = StageJob(stage_dir, PreemptionSignals()).cut_off(137)
    assert again is not None
    assert again.number == found.number + 1


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo 'sacct: error: Problem talking to the database: Connection refused' >&2; exit 1", "sacct failed: sacct"),
        ("/bin/sleep 5", "sacct has not answered for 0.1 s"),
        ("echo 'Slurm accounting storage is disabled' >&2; exit 1", None),
    ],
)
def test_accounts_that_do_not_answer_are_told_of_a_job_that_is_gone(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, told: str | None
) -> None:
    monkeypatch.setattr(queue, "ACCOUNTS_TIMEOUT", 0.1)
    says(tmp_path)
    (tmp_path / "bin/sacct").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin/sacct").chmod(0o700)
    state, note = _first(read_status(run))
    known, _, why = (note or "").partition("; ")
    assert (state, known) == ("interrupted", "SLURM does not know job 7 any more")
    assert why.startswith(told) if told else not why


def test_accounts_that_hang_are_asked_once(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not at each look of `logs -f` or `stop --wait`, nor for each run."""
    monkeypatch.setattr(queue, "ACCOUNTS_TIMEOUT", 0.2)
    says(tmp_path)
    (tmp_path / "bin/sacct").write_text(f"#!/bin/sh\nprintf . >> {tmp_path}/accounts\nexec /bin/sleep 5\n")
    (tmp_path / "bin/sacct").chmod(0o700)
    notes = {_first(read_status(run))[1] for _ in range(3)}
    assert notes == {"SLURM does not know job 7 any more; sacct has not answered for 0.2 s"}
    assert (tmp_path / "accounts").read_text() == "."
    monkeypatch.setattr(queue, "ASKED_AGAIN", 0.0)
    read_status(run)
    assert (tmp_path / "accounts").read_text() == ".."


def test_a_stage_without_a_job_is_seen_to_by_the_job_before(run: RunDir, tmp_path: Path) -> None:
    """The queue had no room for it; between two stages the job of the first tries again."""
    says(tmp_path, FIRST.format("RUNNING", "None"))
    run.stage_dir("01-sft").result.write_text("{}")
    paths.job(run.stage_dir("02-sft")).unlink()
    second = read_status(run).stages[1]
    assert (second.state, second.note) == ("waiting", "job 7 submits it, or goes on with it")
    says(tmp_path, FIRST.format("COMPLETED", "None"))
    assert read_status(run).stages[1].note == "not submitted"


@pytest.mark.parametrize(
    ("state", "reason", "stands", "told"),
    [
        ("NODE_FAIL", "NodeDown", "interrupted", "a node has died, and it was not put back into the queue"),
        ("BOOT_FAIL", "None", "failed", "its nodes did not start"),
    ],
)
def test_nodes_that_die_before_a_stage_starts_are_no_mistake_in_the_profile(
    run: RunDir, tmp_path: Path, state: str, reason: str, stands: str, told: str
) -> None:
    says(tmp_path, FIRST.format(state, reason))
    assert _first(read_status(run)) == (stands, f"SLURM ended its job 7: {state}: {told}")
    early = logs.first_error(run, None, None)
    assert early.message == f"job 7 left no word: {state}: {told}"
    assert early.remedy is not None
    assert early.remedy.endswith("`sinfo -R` tells why, and `ftlaunch resume` goes on")


@pytest.mark.parametrize(
    ("state", "reason", "stands", "told"),
    [
        ("PENDING", "JobHeldAdmin", "queued", "an administrator holds it back, and has to release it"),
        ("RUNNING", "JobHeldAdmin", "running", "stays there until `scontrol release`"),
        ("PENDING", "job requeued in held state", "queued", "somebody put it back and holds it: scontrol release"),
    ],
)
def test_a_job_that_is_held_says_who_has_to_release_it(
    run: RunDir, tmp_path: Path, state: str, reason: str, stands: str, told: str
) -> None:
    says(tmp_path, FIRST.format(state, reason))
    found, note = _first(read_status(run))
    assert found == stands
    assert told in (note or "")


def test_limits_of_one_job_and_limits_of_all_are_told_apart() -> None:
    assert reasons.never_starts("QOSMaxNodePerJobLimit")
    assert reasons.never_starts("PartitionTimeLimit")
    assert not reasons.never_starts("QOSMaxJobsPerUserLimit")
    assert not reasons.never_starts("Resources")
    assert reasons.never_starts("ReqNodeNotAvail, UnavailableNodes:n[1-2]")
    assert reasons.never_starts("launch_failed_requeued_held")  # as scontrol writes it
    # It ends, and the job starts after it.
    assert not reasons.never_starts("ReqNodeNotAvail, Reserved for maintenance")
    assert "earlier" in reasons.why_waiting("ReqNodeNotAvail,_Reserved_for_maintenance")
