"""The SLURM backend's verbs, from submitting to cancelling."""

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from tests.faults.disks import mounted
from tests.launcher.scripted_runs import Text, write_run

from ftlaunch.backend import backends, control, runs
from ftlaunch.backend.driving import come_back
from ftlaunch.backend.prepare import prepare
from ftlaunch.backend.slurm import lanes, paths, queue, submit
from ftlaunch.backend.slurm.backend import Slurm
from ftlaunch.backend.slurm.messages import MadeBy
from ftlaunch.backend.slurm.queue import SEPARATOR
from ftlaunch.cli.run import stop
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import DONE, STAGE_FAILED, UserError
from ftlaunch.processes.outcome import Failure
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import RunDir
from ftlaunch.watch import logs
from ftlaunch.watch.status import read_all, read_status


def start(run: RunDir, *, fresh: bool = False, after: str | None = None) -> int | None:
    return backends.of(run).start(run, detach=False, after=after, fresh=fresh)


def add_job(slurm: Path, id: str, state: str, run: RunDir | None = None) -> None:
    """Have a further job in the queue, of a run or of somebody else."""
    whose = ["r/01-sft", str(run.path)] if run else ["x", "/x"]
    with (slurm / "queue").open("a") as file:
        file.write(SEPARATOR.join([id, state, "None", "n1", "N/A", *whose, "/x.sh"]) + "\n")


@pytest.mark.parametrize(
    ("after", "why"),
    [
        ("77", "SLURM knows no job 77"),
        ("98", "job 98 has ended without success: FAILED"),
        ("none-such", "there is no run 'none-such'"),
    ],
)
def test_what_nothing_can_wait_for_is_refused(run: RunDir, slurm: Path, after: str, why: str) -> None:
    """sbatch takes a number that SLURM does not know for a job that has succeeded."""
    add_job(slurm, "98", "FAILED")
    with pytest.raises(UserError, match=why):
        start(run, after=after)
    assert not (slurm / "waits").exists()


def states(run: RunDir) -> list[str]:
    return [stage.state for stage in read_status(run).stages]


def test_each_stage_is_a_job_that_waits_for_the_one_before(
    run: RunDir, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_job(slurm, "99", "RUNNING")
    assert start(run, after="99") is None
    assert (slurm / "waits").read_text() == "101 afterok:99\n102 afterok:101\n"
    out, err = capsys.readouterr()
    assert "r is submitted: job 101, job 102. Come back with" in err
    assert f"ftlaunch status {run.path}" in out
    assert come_back(RunDir(Path("/a b's"))).splitlines()[0] == """  ftlaunch status '/a b'"'"'s'"""
    submission = queue.read_submission(run)
    assert submission is not None
    assert submission.complete
    assert states(run) == ["waiting", "waiting"]
    assert not backends.of(run).is_over(run)
    with pytest.raises(UserError, match="in the queue already"):
        backends.of(run).require_rest(run)


def test_a_run_in_the_queue_is_not_begun_again_and_its_logs_say_what_it_waits_for(
    run: RunDir, slurm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slurm, "patience", 0.1)
    start(run)
    with pytest.raises(UserError, match="is in the queue already, or runs"):
        prepare(runs.read_plan(run), Text(run.path / "recipe.toml"), backends.of(run))  # pyright: ignore[reportArgumentType]
    capsys.readouterr()
    listener = threading.Thread(target=lambda: [*logs.follow(run, None, None, None)])
    listener.start()
    deadline = time.monotonic() + 30
    told = ""
    while "──" not in told and time.monotonic() < deadline:
        time.sleep(0.02)
        told += capsys.readouterr().err
    rows = (slurm / "queue").read_text()
    (slurm / "queue").write_text(rows.replace("PENDING", "CANCELLED"))
    listener.join(30)
    assert told.startswith("── 01-sft is queued: waits in the queue: Priority")


def test_a_run_of_which_a_job_is_refused_is_taken_back(run: RunDir, slurm: Path) -> None:
    (slurm / "refused").write_text("1")
    with pytest.raises(UserError, match="Invalid account"):
        start(run)
    assert backends.of(run).is_over(run)
    assert not any(paths.job(stage_dir).exists() for stage_dir in run.stage_dirs())
    assert not paths.submission(run).exists()


def test_a_greeting_is_no_reason_and_a_full_queue_is_no_mistake(run: RunDir, slurm: Path) -> None:
    """A site's script greets first; where everybody's jobs fill the queue, later stages are submitted by the first."""
    sbatch = (slurm / "sbatch").read_text()
    refused = 'sys.exit("sbatch: lua: welcome\\nsbatch: error: {}")'
    before = 'sys.exit("sbatch: error: Batch job submission failed: Invalid account")'
    assert before in sbatch
    broken = "\\nsbatch: error: Batch job submission failed: Job violates accounting policy (job submit limit and more)"
    (slurm / "sbatch").write_text(sbatch.replace(before, refused.format(f"QOSMaxWallDurationPerJobLimit{broken}")))
    (slurm / "refused").write_text("1")
    with pytest.raises(UserError, match="cannot be submitted: QOSMaxWallDurationPerJobLimit"):
        start(run)
    assert backends.of(run).is_over(run)
    full = "Slurm temporarily unable to accept job, sleeping and retrying."
    (slurm / "sbatch").write_text(sbatch.replace(before, refused.format(full)))
    (slurm / "refused").write_text("2")
    start(run)
    assert states(run) == ["queued", "waiting"]
    assert not paths.job(run.stage_dir("02-sft")).exists()


def test_trials_wait_for_room_that_slurm_gives_late(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A QoS of one job counts that until SLURM has cleaned up after it, when its stage has its result already."""
    folders = [write_run(tmp_path / name, "train") for name in "ab"]
    for folder in folders:
        write_json(paths.cluster(folder), Cluster())
        (folder.path / "code.json").write_text('{"files": {}}')
    sbatch = (slurm / "sbatch").read_text()
    full = "sbatch: error: QOSMaxSubmitJobPerUserLimit\\nsbatch: error: Batch job submission failed: job submit limit"
    room = f'if any("COMPLETED" not in row for row in known):\n    sys.exit("{full}")\ntold = '
    (slurm / "sbatch").write_text(sbatch.replace("told = ", room, 1))

    def become(state: str) -> None:
        text = (slurm / "queue").read_text()
        (slurm / "queue").write_text(text.replace("PENDING", state).replace("COMPLETING", state))

    def finish(folder: RunDir) -> None:
        folder.stage_dir("01-sft").result.write_text("{}")
        become("COMPLETING")

    events = iter([lambda: finish(folders[0]), lambda: None, lambda: become("COMPLETED"), lambda: finish(folders[1])])
    monkeypatch.setattr(lanes, "time", SimpleNamespace(sleep=lambda _: next(events)()))
    said: list[str] = []
    later = backends.on(Cluster(qos="later"))
    assert later.conduct({folder.path.name: folder for folder in folders}, 2, said.append) == DONE
    assert [queue.read_cluster(folder).qos for folder in folders] == ["later", "later"]  # not the profile of before
    assert said[0].startswith("2 trials: 1 not submitted yet, 1 queued; 01-sft cannot be submitted: QOSMaxSubmitJob")
    assert said[-1] == "2 trials: 2 done"


@pytest.mark.parametrize(("taken", "left"), [(3, ["100", "101"]), (1, [])])
def test_a_stage_whose_successors_find_no_room_is_taken_back(
    run: RunDir, slurm: Path, taken: int, left: list[str]
) -> None:
    """Its own job would otherwise wait in the queue, take the room, and leave as it is not on record."""
    write_json(paths.cluster(run), Cluster(restart="successor", successors=1))
    sbatch = (slurm / "sbatch").read_text()
    (slurm / "sbatch").write_text(sbatch.replace("Invalid account", "QOSMaxSubmitJobPerUserLimit"))
    (slurm / "refused").write_text(str(taken))
    if left:
        start(run)
        assert not paths.job(run.stage_dir("02-sft")).exists()
    else:
        with pytest.raises(UserError, match="of its successors") as caught:
            start(run)
        assert caught.value.remedy.startswith("fewer `successors`")
    assert [id for id, entry in queue.read_queue(run).items() if entry.alive] == left


def test_a_fresh_run_that_is_refused_leaves_no_folder(run: RunDir, slurm: Path) -> None:
    (slurm / "refused").write_text("0")
    with pytest.raises(UserError) as caught:
        start(run, fresh=True)
    assert not run.path.exists()
    assert caught.value.remedy.endswith("run it again then: nothing is left of it")


def test_stopping_takes_what_waits_out_of_the_queue(run: RunDir, slurm: Path) -> None:
    start(run)
    assert (slurm / "queue").exists()
    assert control.ask_to_stop(run, wait=0)
    assert run.stage_dir("01-sft").stop.read_text() == "asked"
    assert states(run) == ["stopped", "cancelled"]
    with pytest.raises(UserError, match="not running"):
        control.ask_to_stop(run, wait=0)


@pytest.mark.usefixtures("slurm")
def test_stop_says_that_the_last_save_has_failed(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    start(run)
    attempt = run.stage_dir("01-sft").new_attempt(made_by=MadeBy(job="100", restart=0))
    write_json(attempt.error, Failure(rank=0, type="OSError", message="No space left on device", log="x"))
    with pytest.raises(typer.Exit) as left:
        stop(str(run.path), 0.0)
    assert left.value.exit_code == STAGE_FAILED
    assert "r has ended, and failed on its way: rank 0: No space left on device" in capsys.readouterr().err


def test_cancelling_ends_every_job(run: RunDir, slurm: Path) -> None:
    start(run)
    assert (slurm / "queue").exists()
    assert control.cancel(run)
    assert states(run) == ["cancelled", "cancelled"]
    assert not control.cancel(run)


def test_a_queue_out_of_reach_is_told_after_the_stop_was_asked_for(run: RunDir, slurm: Path) -> None:
    start(run)
    (slurm / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact' >&2; exit 1\n")
    with pytest.raises(UserError, match="saves and leaves if it runs, but"):
        control.ask_to_stop(run, wait=0)
    with pytest.raises(UserError, match="is ended where it runs, but"):
        control.cancel(run)
    assert read_status(run).state == "unknown"


def test_what_cannot_be_written_down_is_asked_of_slurm_all_the_same(run: RunDir, slurm: Path) -> None:
    """As on a full disk, or one over its quota: here a folder is where the stop file would be."""
    start(run)
    run.stage_dir("01-sft").stop.mkdir()
    with pytest.raises(UserError, match="01-sft/stop cannot be written"):
        control.ask_to_stop(run, wait=0)
    assert (slurm / "queue").read_text().count("CANCELLED") == 2
    add_job(slurm, "150", "RUNNING", run)
    assert control.cancel(run)
    assert (slurm / "queue").read_text().count("CANCELLED") == 3


def test_a_local_run_that_moves_to_a_cluster_is_the_clusters(run: RunDir, slurm: Path) -> None:
    paths.cluster(run).unlink()
    local = backends.driven(run)
    assert local.patience == 0
    backends.move(run, backends.on(Cluster(partition="gpu")))
    assert queue.read_cluster(run).partition == "gpu"
    with pytest.raises(UserError, match="a cluster's to run"):
        backends.driven(run)
    start(run)
    assert "--partition=gpu" in (next(paths.jobs(run.stage_dir("01-sft")).glob("*.sh"))).read_text()
    assert (slurm / "queue").exists()


def test_runs_of_several_backends_are_told_in_their_order(run: RunDir, slurm: Path, tmp_path: Path) -> None:
    start(run)
    assert (slurm / "queue").exists()
    here, there = write_run(tmp_path / "a", "train"), write_run(tmp_path / "z", "train")
    found = read_all([here, run, there])
    assert [(one.name, one.state) for one in found] == [("a", "waiting"), ("r", "queued"), ("z", "waiting")]
    assert [stage.job for one in found for stage in one.stages] == [None, "100", "101", None]


def test_the_scripts_that_are_shown_are_those_of_every_stage(run: RunDir) -> None:
    plan = runs.read_plan(run)
    asked = backends.on(Cluster(partition="gpu", account="physics")).foresee(plan)
    assert [*asked.requests] == ["01-sft", "02-sft"]
    assert "#SBATCH --account=physics" in asked.requests["01-sft"].script
    assert backends.on(None).foresee(plan).requests == {}


def test_without_sbatch_nothing_is_submitted(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="sbatch is not installed here"):
        submit.require_fit(runs.read_plan(run), Cluster())


@pytest.mark.parametrize("pages", [0, 1, 3, 5, 7])
def test_a_disk_that_fills_up_during_a_submission_leaves_no_job(slurm: Path, tmp_path: Path, pages: int) -> None:
    """At the lock, the record, between two jobs, at the end: the folder of a run on a disk with so many pages left."""
    with mounted(tmp_path / "disk", 4096) as disk:
        run = write_run(disk.path / "r", "train", "train")
        write_json(paths.cluster(run), Cluster())
        (run.path / "code.json").write_text('{"files": {}}')
        room = os.statvfs(disk.path)
        disk.resize((room.f_blocks - room.f_bfree + pages) * room.f_frsize // 1024)
        with pytest.raises(UserError, match="No space left on device") as refused:
            start(run)
        assert refused.value.remedy == "make room, or mend the disk"
        rows = (slurm / "queue").read_text().splitlines() if (slurm / "queue").exists() else []
        assert {row.split(SEPARATOR)[1] for row in rows} <= {"CANCELLED"}
        assert queue.on_record(run) == {}
        disk.resize(4096)
        assert start(run) is None
