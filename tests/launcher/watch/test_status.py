"""How runs stand, read from folders that say so."""

import json
import os
import time
from pathlib import Path

import msgspec
import pytest
from tests.faults.disks import mounted
from tests.launcher.scripted_runs import write_run

from ftlaunch import processes
from ftlaunch.backend import backends, runs
from ftlaunch.backend.status import StageStatus
from ftlaunch.errors import UserError
from ftlaunch.processes import Identity, lock
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import Attempt, RunDir, StageDir
from ftlaunch.run.pace import Pace
from ftlaunch.run.progress import Preparing
from ftlaunch.run.records import SaveFailure
from ftlaunch.watch.status import read_status


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return write_run(tmp_path / "r", "train", "train")


def first(run: RunDir) -> StageDir:
    return run.stage_dir("01-sft")


def launched(run: RunDir, **changes: object) -> Attempt:
    """An attempt that this very process is said to have launched."""
    attempt = first(run).new_attempt()
    who = msgspec.structs.replace(processes.identify(os.getpid()), **changes)
    attempt.process.write_bytes(msgspec.json.encode(who))
    return attempt


def stage(run: RunDir) -> StageStatus:
    return read_status(run).stages[0]


def measure(run: RunDir, *entries: dict[str, object]) -> None:
    first(run).metrics.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_nothing_has_started(run: RunDir) -> None:
    status = read_status(run)
    assert (status.name, status.state) == ("r", "waiting")
    assert [(each.name, each.state, each.attempts) for each in status.stages] == [
        ("01-sft", "waiting", 0),
        ("02-sft", "waiting", 0),
    ]


def test_running_while_its_process_lives(run: RunDir) -> None:
    launched(run)
    assert (stage(run).state, read_status(run).state) == ("running", "running")


def test_rows_that_are_prepared_are_told(run: RunDir) -> None:
    launched(run)
    write_json(first(run).preparing, Preparing(data="/rows/facts.jsonl", rows=123904, rows_per_second=4120.4))
    assert stage(run).note == "tokenizing facts.jsonl: 123,904 rows, 4,120 a second"


@pytest.mark.parametrize("changes", [{"start_time": 1}, {"boot_id": "another"}, {"pid": 2**22 + 1}])
def test_interrupted_when_that_very_process_is_gone(run: RunDir, changes: dict[str, object]) -> None:
    launched(run, **changes)
    assert stage(run).state == "interrupted"


def test_another_hosts_processes_cannot_be_seen(run: RunDir) -> None:
    launched(run, host="elsewhere")
    assert (stage(run).state, stage(run).note) == ("unknown", "started on elsewhere")


def test_an_attempt_that_is_about_to_start_runs_as_long_as_its_driver(run: RunDir) -> None:
    first(run).new_attempt()
    assert stage(run).state == "interrupted"
    held = lock.take(run)
    assert stage(run).state == "running"
    lock.release(held)


def test_between_two_stages_a_driven_run_is_running(run: RunDir) -> None:
    first(run).result.write_text("{}")
    held = lock.take(run)
    assert (read_status(run).state, backends.of(run).is_over(run)) == ("running", False)
    lock.release(held)
    assert (read_status(run).state, backends.of(run).is_over(run)) == ("waiting", True)


def test_a_driver_on_another_host_is_not_taken_for_dead(run: RunDir) -> None:
    who = Identity(host="elsewhere", pid=1, start_time=1, boot_id="b")
    run.lock.write_bytes(msgspec.json.encode(who))
    assert (read_status(run).state, backends.of(run).is_over(run)) == ("unknown", False)


@pytest.mark.parametrize(
    ("name", "content", "state"),
    [
        ("stopped.json", {"reason": "stop file", "step": 3}, "stopped"),
        ("error.json", {"rank": 1, "type": "E", "message": "boom\nmore", "log": "l"}, "failed"),
        ("../../result.json", {}, "done"),
    ],
)
def test_what_an_attempt_left_counts_more_than_its_process(run: RunDir, name: str, content: object, state: str) -> None:
    (launched(run).path / name).write_text(json.dumps(content))
    assert stage(run).state == state
    assert stage(run).note == ("rank 1: boom" if state == "failed" else None)


def test_an_error_may_have_no_words(run: RunDir) -> None:
    (launched(run).path / "error.json").write_text('{"rank": null, "type": "E", "message": "", "log": "l"}')
    assert (stage(run).state, stage(run).note) == ("failed", "")


def test_only_the_newest_attempt_counts(run: RunDir) -> None:
    (launched(run).path / "stopped.json").write_text('{"reason": "", "step": 1}')
    launched(run)
    assert (stage(run).state, stage(run).attempts) == ("running", 2)


def test_progress_is_that_of_the_newest_step(run: RunDir) -> None:
    launched(run)
    measure(
        run,
        *({"step": step, "steps": 10, "loss": 1 / step, "time": 100.0 + 2 * step} for step in (1, 2, 3, 4)),
        {"step": 4, "eval/loss": 0.5, "time": 200.0},
    )
    now = stage(run)
    assert (now.step, now.steps, now.loss, now.seconds_left) == (4, 10, 0.25, 12.0)


def test_a_pause_between_attempts_does_not_count_as_pace(run: RunDir) -> None:
    launched(run)
    times = (100.0, 101.0, 102.0, 9000.0, 9001.0)
    measure(run, *({"step": step, "steps": 15, "loss": 1.0, "time": at} for step, at in enumerate(times, start=1)))
    assert stage(run).seconds_left == 10.0


def test_lines_that_a_crash_garbled_are_passed_over(run: RunDir) -> None:
    launched(run)
    good = {"step": 7, "steps": 10, "loss": 1.0, "time": 1.0}
    first(run).metrics.write_text('{"step": 6, "lo{"step": 6}\n' + json.dumps(good) + '\n{"step": 8, ')
    assert stage(run).step == 7


def test_a_long_history_is_read_from_its_end(run: RunDir) -> None:
    launched(run)
    steps = range(1, 20001)
    measure(run, *({"step": step, "steps": 30000, "loss": 1.0, "time": float(step)} for step in steps))
    began = time.perf_counter()
    assert (stage(run).step, stage(run).seconds_left) == (20000, 10000.0)
    assert time.perf_counter() - began < 0.1


def test_only_complete_checkpoints_count(run: RunDir) -> None:
    for number, complete in ((100, True), (200, True), (300, False)):
        folder = first(run).checkpoints / f"step-{number:08d}"
        folder.mkdir(parents=True)
        (folder / "rank0.safetensors").touch()
        if complete:
            (folder / "manifest.json").write_text("{}")
    assert stage(run).checkpoint == str(first(run).checkpoints / "step-00000200")


def test_saves_that_fail_are_told(run: RunDir) -> None:
    launched(run)
    first(run).step.write_text('{"stage": {"save_every": 10}}')
    (first(run).checkpoints / "step-00000010").mkdir(parents=True)
    (first(run).checkpoints / "step-00000010/manifest.json").write_text("{}")
    measure(run, {"step": 30, "steps": 100, "loss": 1.0})
    assert stage(run).note is None
    measure(run, {"step": 31, "steps": 100, "loss": 1.0})
    assert (stage(run).note or "").startswith("saves fail or are slow: one is due every 10 steps, and the newest")
    write_json(first(run).save_failure, SaveFailure(step=20, cause="rank 0: No space left on device"))
    cause = "step 20 could not be saved: rank 0: No space left on device; the newest checkpoint is of step 10"
    assert stage(run).note == cause


def test_a_disk_that_takes_no_word_is_told_as_why_no_steps_are_on_record(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 600) as disk:
        run = write_run(disk.path / "r", "train")
        launched(run)
        now = time.time()
        os.utime(first(run).all_attempts()[-1].process, (now - 900, now - 900))
        measure(run, *({"step": step, "steps": 90, "loss": 1.0, "time": now - 500 + step} for step in (1, 2, 3)))
        with pytest.raises(OSError, match="No space left"):
            (disk.path / "fill").write_bytes(bytes(1 << 20))
        os.utime(first(run).metrics)  # as an attempt to write does
        note = stage(run).note or ""
    assert note.startswith("steps are no longer on record: ")
    assert note.endswith("01-sft cannot be written: No space left on device")


def test_runs_are_found_by_folder_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/a", "train")
    write_run(tmp_path / "elsewhere/b", "train")
    assert runs.find("a").path == runs.find("runs/a").path == tmp_path / "runs/a"
    assert runs.find(str(tmp_path / "elsewhere/b")).path.name == "b"
    assert [run.path.name for run in runs.all_runs()] == ["a"]
    with pytest.raises(UserError) as caught:
        runs.find("b")
    assert caught.value.remedy == "there are: a"


def test_a_plan_of_another_version_is_said(run: RunDir) -> None:
    run.plan.write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        runs.read_plan(run)


def test_a_rank_that_keeps_others_waiting_is_named_with_its_host(run: RunDir) -> None:
    attempt = launched(run)
    measure(run, {"step": 9, "steps": 90, "loss": 1.0, "time": time.time()})
    even = Pace(step=9, seconds=[1.0, 1.1, 1.4, 1.0], whole=3.0, hosts=["a", "a", "b", "b"])
    write_json(attempt.pace, even)
    assert stage(run).note is None
    write_json(attempt.pace, msgspec.structs.replace(even, seconds=[1.0, 1.1, 2.4, 1.0]))
    assert stage(run).note == "rank 2 on b keeps the others waiting: 2.4 times their work at a step"
    write_json(attempt.pace, msgspec.structs.replace(even, seconds=[1.0, 1.1, 2.4, 1.0], whole=30.0))
    assert stage(run).note is None, "no more than a tenth of a step"
    launched(run)
    assert stage(run).note is None, "of an earlier attempt"


def test_an_attempt_that_takes_no_more_steps_is_told(run: RunDir) -> None:
    launched(run)
    now = time.time()
    os.utime(first(run).all_attempts()[-1].process, (now - 900, now - 900))
    steps = [{"step": step, "steps": 90, "loss": 1.0, "time": now - 500 + step} for step in (1, 2, 3)]
    measure(run, *steps)
    assert stage(run).note is None, "written just now, by a node whose clock is late"
    os.utime(first(run).metrics, (now - 497, now - 497))
    assert (stage(run).note or "").startswith("no step for 8:1")
    measure(run, *steps, {"step": 4, "steps": 90, "loss": 1.0, "time": now - 180})
    assert stage(run).note is None, "a pause as long as one before"
