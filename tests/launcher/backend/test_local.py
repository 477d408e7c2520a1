"""The local backend, driving small real processes."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.launcher.scripted_runs import write_run

from ftlaunch import processes
from ftlaunch.backend import backends, control, supervisor, watchdog
from ftlaunch.backend.display import PlainDisplay
from ftlaunch.backend.local.driver import Local
from ftlaunch.errors import BAD_INPUT, DONE, INTERRUPTED, STAGE_FAILED, STOPPED, UserError
from ftlaunch.processes import lock
from ftlaunch.run.layout import RunDir
from ftlaunch.watch.status import read_status


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.01)


HEARD = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


@pytest.fixture(autouse=True)
def _signals_are_heard() -> Iterator[None]:
    """A test run in the background may have been started with some of them ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in HEARD}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def drive(run: RunDir) -> tuple[int, str]:
    said = StringIO()
    code = Local().drive_stages(run, PlainDisplay(said), None)
    assert processes.of_attempts(run.path) == []
    return code, said.getvalue()


@contextmanager
def in_a_moment(run: RunDir, *signals: signal.Signals, sign: str = "01-sft/metrics.jsonl") -> Iterator[None]:
    """Send this process signals, one after the other, once the stage gives a sign of life."""

    def send() -> None:
        wait_for(run.path / sign)
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.03)

    sender = threading.Thread(target=send)
    sender.start()
    yield
    sender.join()


class SignalWhenDone(PlainDisplay):
    """Sends this process a signal right after each stage."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(StringIO())
        self.number = number

    def say(self, text: str) -> None:
        if "done" in text:
            os.kill(os.getpid(), self.number)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 5
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()


def test_stages_run_one_after_another(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train", "train")
    code, said = drive(run)
    assert code == DONE
    assert all(stage_dir.result.exists() for stage_dir in run.stage_dirs())
    assert said.index("01-sft  done") < said.index("02-sft  attempt 1, 2 processes") < said.index("02-sft  done")
    assert "01-sft  step 3/3  loss 0.6667  1,234 tokens/s" in said


def test_what_was_measured_since_the_last_look_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.15)
    assert "01-sft  step 3/3" in drive(write_run(tmp_path / "r", "train"))[1]


def test_an_attempt_tells_who_launched_it_and_keeps_what_was_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train")
    drive(run)
    attempt = run.stage_dir("01-sft").all_attempts()[0]
    assert json.loads(attempt.process.read_text()).keys() == {"host", "pid", "start_time", "boot_id"}
    assert attempt.launch_log.read_text() == "launched\n"
    assert (run.path / "01-sft/attempts/latest").resolve() == attempt.path


def test_when_an_attempt_began_is_told_by_the_clock_of_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As metrics are; a file server's clock may differ, and then a restart would be taken for a long step."""
    clock = SimpleNamespace(time=lambda: 5000.0, monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr(supervisor, "time", clock)
    run = write_run(tmp_path / "r", "train")
    drive(run)
    assert run.stage_dir("01-sft").all_attempts()[0].process.stat().st_mtime == 5000.0


def test_finished_stages_are_skipped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "fail", "train")
    run.stage_dir("01-sft").result.write_text("{}")
    assert drive(run)[0] == DONE
    assert run.stage_dir("01-sft").all_attempts() == []
    assert drive(run) == (DONE, "")


def test_a_failed_stage_ends_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "fail", "train")
    code, said = drive(run)
    assert code == STAGE_FAILED
    assert "error: rank 1: RuntimeError: boom\n    Traceback\n" in said
    assert f"log: {run.path}/01-sft/attempts/1/rank1.log" in said
    assert run.stage_dir("02-sft").all_attempts() == []


def test_a_rank_that_is_stopped_while_others_wait_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHECK_SECONDS", "STOPPED_SECONDS", "STACK_SECONDS"):
        monkeypatch.setattr(watchdog, name, 0.1)
    run = write_run(tmp_path / "r", "hang")
    code, said = drive(run)
    assert code == STAGE_FAILED
    assert re.search(r"rank 1: Hang: no step for \d s; rank 1 on \S+ is stopped by a signal", said)


def test_a_users_mistake_is_shown_with_its_remedy_only(tmp_path: Path) -> None:
    code, said = drive(write_run(tmp_path / "r", "fail_by_user"))
    assert code == BAD_INPUT
    assert "error: rank 0: no rows are left\n  → raise max_length\n" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("act", ["lose_a_rank", "echo_a_lost_rank"])
def test_a_killed_rank_is_named(tmp_path: Path, act: str) -> None:
    run = write_run(tmp_path / "r", act)
    code, said = drive(run)
    assert code == STAGE_FAILED
    assert "error: rank 1: killed by SIGKILL\n" in said
    assert "ran out of memory" in said
    assert read_status(run).stages[0].note == "rank 1: killed by SIGKILL"


def test_a_killed_launcher_is_named(tmp_path: Path) -> None:
    code, said = drive(write_run(tmp_path / "r", "die"))
    assert (code, "the launching process was killed by SIGKILL" in said) == (STAGE_FAILED, True)


def test_without_any_word_the_end_of_the_launch_log_is_shown(tmp_path: Path) -> None:
    code, said = drive(write_run(tmp_path / "r", "break_down"))
    assert code == STAGE_FAILED
    assert "    ValueError: accelerate does not like this\n" in said
    assert "attempts/1/launch.log" in said


def test_a_process_that_failed_before_it_had_a_log_is_heard(tmp_path: Path) -> None:
    said = drive(write_run(tmp_path / "r", "fail_to_import"))[1]
    assert "error: rank 0: ended with exit code 1 and left no word" in said
    assert "\n    ImportError: no module\n  log: " in said


@pytest.mark.parametrize(("peer", "idle"), [(0.05, 60.0), (60.0, 0.3)], ids=["after a while", "once they idle"])
def test_peers_of_a_failed_rank_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer: float, idle: float
) -> None:
    monkeypatch.setattr(supervisor, "PEER_SECONDS", peer)
    monkeypatch.setattr(supervisor, "IDLE_SECONDS", idle)
    run = write_run(tmp_path / "r", "fail_beside_a_deaf_peer")
    began = time.monotonic()
    assert drive(run)[0] == STAGE_FAILED  # drive() here asserts that no process is left
    assert time.monotonic() - began < 5


def test_a_worker_in_its_own_session_does_not_outlive_its_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LEAVE_SECONDS", 0.05)
    run = write_run(tmp_path / "r", "leave_a_worker")
    assert drive(run)[0] == DONE  # drive() here asserts that no process is left
    assert (run.path / "01-sft/child").exists()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, STOPPED), (signal.SIGHUP, STOPPED)]
)
def test_one_signal_saves_and_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    monkeypatch.setattr("ftlaunch.processes.signals.detach_output", lambda: None)
    run = write_run(tmp_path / "r", "train_until_stopped", "train")
    with in_a_moment(run, number):
        ended, said = drive(run)
    assert ended == code
    assert ("Ctrl-C again to kill" in said) == (number == signal.SIGINT)
    assert "saved and stopped" in said
    assert f"ftlaunch resume {run.path}" in said
    assert [stage.state for stage in read_status(run).stages] == ["stopped", "waiting"]


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ((signal.SIGINT, signal.SIGINT), INTERRUPTED),
        ((signal.SIGTERM, signal.SIGTERM), STOPPED),
        ((signal.SIGQUIT,), STOPPED),
    ],
)
def test_a_second_signal_kills(tmp_path: Path, signals: tuple[signal.Signals, ...], code: int) -> None:
    run = write_run(tmp_path / "r", "never_leave")
    with in_a_moment(run, *signals, sign="01-sft/ready"):
        ended, said = drive(run)
    assert (ended, "killed after" in said) == (code, True)
    assert read_status(run).state == "interrupted"


def test_a_hangup_said_twice_still_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftlaunch.processes.signals.detach_output", lambda: None)
    run = write_run(tmp_path / "r", "take_long_to_stop")
    with in_a_moment(run, signal.SIGHUP, signal.SIGHUP):
        assert drive(run)[0] == STOPPED
    assert read_status(run).state == "stopped"


def test_a_hangup_that_nohup_ignores_is_not_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftlaunch.processes.signals.detach_output", lambda: None)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run = write_run(tmp_path / "r", "train", "train")
    assert Local().drive_stages(run, SignalWhenDone(signal.SIGHUP), None) == DONE


def test_a_stop_that_comes_with_the_end_of_a_stage_keeps_the_next_from_starting(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "finish_when_stopped", "train")
    with in_a_moment(run, signal.SIGTERM, sign="01-sft/attempts/1/process.json"):
        code, said = drive(run)
    assert (code, "02-sft  not started" in said) == (STOPPED, True)
    assert [stage.state for stage in read_status(run).stages] == ["done", "waiting"]


def test_a_signal_between_two_stages_keeps_the_next_from_starting(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train", "train")
    assert Local().drive_stages(run, SignalWhenDone(signal.SIGTERM), None) == STOPPED
    assert run.stage_dir("02-sft").all_attempts() == []


def test_a_launcher_that_cannot_be_found_by_its_environment_is_killed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "end", lambda *_, **__: [])
    run = write_run(tmp_path / "r", "train_until_stopped")
    with in_a_moment(run, signal.SIGQUIT):
        assert drive(run)[0] == STOPPED


def test_the_next_drive_forgets_the_last_ones_stop(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train")
    run.stage_dir("01-sft").stop.touch()
    assert backends.driven(run).drive(run) == DONE
    assert not run.stage_dir("01-sft").stop.exists()


def test_signals_mean_again_what_they_meant(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    drive(write_run(tmp_path / "r", "train"))
    assert signal.getsignal(signal.SIGINT) is before


def test_processes_die_with_a_driver_that_breaks(tmp_path: Path) -> None:
    class Broken(PlainDisplay):
        def show(self, entries: object) -> None:  # noqa: ARG002
            if (tmp_path / "r/01-sft/ready").exists():
                raise OSError("no space left on device")

    run = write_run(tmp_path / "r", "never_leave")
    with pytest.raises(OSError, match="no space"):
        Local().drive_stages(run, Broken(StringIO()), None)
    assert processes.of_attempts(run.path) == []


def test_a_missing_program_is_said_before_anything_is_started(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train")
    run.plan.write_text(run.plan.read_text().replace(sys.executable, "no-such-program"))
    with pytest.raises(UserError, match="no-such-program is not installed"):
        drive(run)
    assert run.stage_dir("01-sft").all_attempts() == []


def test_only_one_drives(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train")
    held = lock.take(run)
    with pytest.raises(UserError, match=f"already running .process {os.getpid()} on ") as caught:
        backends.driven(run).drive(run)
    assert "ftlaunch stop" in caught.value.remedy
    lock.release(held)
    assert backends.driven(run).drive(run) == DONE


def test_processes_without_a_driver_are_not_joined_by_others(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train")
    orphan = subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; time.sleep(60)"],
        env={processes.ATTEMPT: str(run.path / "01-sft/attempts/1")},
    )
    while not processes.of_attempts(run.path):
        time.sleep(0.01)
    with pytest.raises(UserError, match="still has 1 processes"):
        backends.driven(run).drive(run)
    assert control.cancel(run) is True
    assert orphan.wait() == -signal.SIGKILL
    assert drive(run)[0] == DONE


WITHOUT_LOOPBACK = """
from types import SimpleNamespace as Here
from ftlaunch.backend.local.driver import Local
from ftlaunch.errors import UserError
def plan(count):
    spec = Here(world_size=count, parallel=Here(nodes=1))
    return Here(stages=[Here(spec=spec)])
Local().require_nodes(plan(1))
try:
    Local().require_nodes(plan(2))
except UserError as error:
    print(error)
"""


def test_ranks_that_have_nowhere_to_meet_are_refused_at_once():
    """In a network of its own, whose loopback is down: torch would try to connect for a quarter of an hour."""
    command = ["unshare", "--map-root-user", "--net", sys.executable, "-c", WITHOUT_LOOPBACK]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "unshare" in done.stderr:
        pytest.skip(f"no network namespace may be made here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "127.0.0.1, which cannot be reached on this machine" in done.stdout
    assert "ip address add 127.0.0.1/8 dev lo" in done.stdout
