"""What a rank leaves of the error that ended it."""

from pathlib import Path

from ftlaunch.errors import UserError
from ftlaunch.processes.outcome import read_failure
from ftlaunch.run.layout import Attempt
from fttrain.__main__ import PeerDied, report


def attempt(folder: Path) -> Attempt:
    (folder / "1").mkdir()
    return Attempt(folder / "1")


def test_the_launcher_reads_what_a_rank_reports_whatever_a_file_is_called(tmp_path: Path) -> None:
    here = attempt(tmp_path)
    report(UserError("caf\udce9.jsonl cannot be read", "rename it"), 1, here)
    failure = read_failure(here)
    assert failure is not None
    assert (failure.rank, failure.type, failure.message) == (1, "UserError", "caf\\udce9.jsonl cannot be read")
    assert (failure.remedy, failure.user_error, failure.log) == ("rename it", True, str(here.path / "rank1.log"))


def test_only_the_first_error_of_an_attempt_is_kept(tmp_path: Path) -> None:
    here = attempt(tmp_path)
    report(PeerDied(3, 77), 0, here)
    report(ValueError("later"), 2, here)
    failure = read_failure(here)
    assert failure is not None
    assert (failure.rank, failure.type, failure.remedy, failure.user_error) == (3, "PeerDied", None, False)
    assert [path.name for path in here.path.iterdir()] == ["error.json"]
