"""Logs of several ranks as one stream."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.launcher.scripted_runs import write_run

from ftlaunch.errors import UserError
from ftlaunch.processes import Identity, lock
from ftlaunch.processes.outcome import describe_failure
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import Attempt, RunDir
from ftlaunch.run.tail import CHUNK, Tail
from ftlaunch.watch import logs


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return write_run(tmp_path / "r", "train", "train")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "FOLLOW_SECONDS", 0.01)


def attempt_of(run: RunDir, stage: str, **said: str) -> Attempt:
    attempt = run.stage_dir(stage).new_attempt()
    for name, text in said.items():
        (attempt.path / f"{name}.log").write_text(text)
    return attempt


def test_all_ranks_of_the_latest_attempt_of_the_newest_stage(run: RunDir) -> None:
    attempt_of(run, "01-sft", rank0="old stage\n")
    attempt_of(run, "02-sft", rank0="old attempt\n")
    attempt_of(run, "02-sft", launch="warned\n", rank0="a\nb\n", rank1="c\n", rank10="no end")
    assert list(logs.read(run, None, None, None)) == [
        "[launch] warned",
        "[rank 0] a",
        "[rank 0] b",
        "[rank 1] c",
        "[rank 10] no end",
    ]


def test_a_stage_an_attempt_and_a_rank_can_be_chosen(run: RunDir) -> None:
    attempt_of(run, "01-sft", launch="x\n", rank0="one\n", rank1="other\n")
    attempt_of(run, "01-sft", rank0="two\n")
    attempt_of(run, "02-sft", rank0="three\n")
    assert list(logs.read(run, "01-sft", 1, 0)) == ["[rank 0] one"]


def test_a_node_can_be_chosen_by_its_name(run: RunDir) -> None:
    attempt = attempt_of(run, "01-sft", launch="x\n", launch1="y\n", rank0="one\n", rank1="other\n")
    for number, host in enumerate(("n1", "n2")):
        who = Identity(host=host, pid=1, start_time=1, boot_id="")
        write_json(attempt.on_node(number).process, who)
    assert list(logs.read(run, None, None, None, "n1")) == ["[launch] x", "[rank 0] one"]
    assert list(logs.read(run, None, None, None, "n2")) == ["[launch, node 1] y", "[rank 1] other"]
    with pytest.raises(UserError, match="ran on n3") as raised:
        list(logs.read(run, None, None, None, "n3"))
    assert raised.value.remedy == "it ran on n1, n2"


def test_what_does_not_exist_is_said(run: RunDir) -> None:
    with pytest.raises(UserError, match="r has not started yet"):
        list(logs.read(run, None, None, None))
    attempt_of(run, "01-sft", rank0="one\n")
    with pytest.raises(UserError, match="no attempt 2"):
        list(logs.read(run, None, 2, None))
    with pytest.raises(UserError, match="rank 1 has no log"):
        list(logs.read(run, None, None, 1))
    with pytest.raises(UserError, match="r has 2 stages 'sft'"):
        list(logs.read(run, "sft", None, None))
    with pytest.raises(UserError) as caught:
        list(logs.read(run, "dpo", None, None))
    assert caught.value.remedy == "name one of 01-sft, 02-sft"


def test_a_kind_is_name_enough_where_there_is_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train")
    attempt_of(run, "01-sft", rank0="one\n")
    assert list(logs.read(run, "sft", None, None)) == ["[rank 0] one"]


def test_following_goes_over_stages_to_the_runs_end(run: RunDir) -> None:
    held = lock.take(run)
    heard = logs.follow(run, None, None, None)
    attempt_of(run, "01-sft", rank0="one\n")
    assert next(heard) == "[rank 0] one"
    attempt = attempt_of(run, "02-sft", rank0="two\nhalf")
    assert next(heard) == "[rank 0] two"
    threading.Thread(target=end, args=(attempt, held)).start()
    assert list(heard) == ["[rank 0] half a line", "[rank 1] last"]


def end(attempt: Attempt, held: int) -> None:
    time.sleep(0.05)
    with attempt.rank_log(0).open("a") as file:
        file.write(" a line\n")
    attempt.rank_log(1).write_text("last")
    lock.release(held)


def test_following_waits_for_a_run_that_is_about_to_start(run: RunDir) -> None:
    held = lock.take(run)
    heard: list[str] = []
    listener = threading.Thread(target=lambda: heard.extend(logs.follow(run, None, None, None)))
    listener.start()
    time.sleep(0.03)
    attempt_of(run, "01-sft", rank0="one\n")
    lock.release(held)
    listener.join(5)
    assert heard == ["[rank 0] one"]


def test_the_first_error_is_that_of_the_newest_failed_attempt(run: RunDir) -> None:
    with pytest.raises(UserError, match="no error"):
        logs.first_error(run, None, None)
    error = '{"rank": 1, "type": "E", "message": "%s", "traceback": "%s", "log": "/l/rank1.log"}'
    attempt_of(run, "01-sft").error.write_text(error % ("boom", "\\n".join(f"line {n}" for n in range(30))))
    attempt_of(run, "01-sft").error.write_text(error % ("bang", "t"))
    attempt_of(run, "02-sft")
    assert logs.first_error(run, None, None).message == "bang"
    failure = logs.first_error(run, "01-sft", 1)
    told = describe_failure(failure, in_full=True).splitlines()
    assert (told[0], told[1], told[-1]) == ("error: rank 1: E: boom", "    line 0", "  log: /l/rank1.log")
    assert (len(told), len(describe_failure(failure).splitlines())) == (32, 10)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    return tmp_path / "log"


def test_a_tail_gives_whole_lines_once(file: Path) -> None:
    tail = Tail(file)
    assert tail.read() == []
    file.write_bytes(b"one\ntw")
    assert tail.read() == ["one"]
    with file.open("ab") as more:
        more.write(b"o\n\xff\n")
    assert tail.read() == ["two", "�"]
    assert tail.last() == []


def test_a_tail_starts_again_with_a_shorter_or_another_file(file: Path) -> None:
    tail = Tail(file)
    file.write_text("one\ntwo\nhalf")
    tail.read()
    file.write_text("three\n")
    assert tail.read() == ["three"]
    temporary = file.with_name("rotated")
    temporary.write_text("four\nfive\n")
    temporary.replace(file)
    assert tail.read() == ["four", "five"]


def test_a_tail_reads_a_large_file_piece_by_piece(file: Path) -> None:
    file.write_text("x" * 99 + "\n" + "y" * (CHUNK + 10) + "\nend\n")
    tail = Tail(file)
    assert tail.read() == ["x" * 99]
    assert [len(line) for line in tail.read()] == [CHUNK + 10, 3]
