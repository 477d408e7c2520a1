"""Files and folders that appear whole or not at all."""

from pathlib import Path

import pytest

from ftlaunch.errors import UserError
from ftlaunch.run.files import file_by_rename, folder_by_rename, require_empty, why_unwritable


def fill_and_fail(folder: Path) -> None:
    with folder_by_rename(folder) as temporary:
        (temporary / "half").touch()
        raise RuntimeError


def fill_meanwhile(folder: Path) -> None:
    with folder_by_rename(folder) as temporary:
        (temporary / "file").touch()
        folder.mkdir()
        (folder / "mine").touch()


def write_and_fail(path: Path, *, durable: bool) -> None:
    with file_by_rename(path, durable=durable) as file:
        file.write(b"new")
        raise RuntimeError


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/stale").touch()  # of an attempt that was killed
    with folder_by_rename(out) as folder:
        (folder / "inner").mkdir()
        (folder / "inner/file").write_text("x")
        assert not out.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "inner", "file"]


def test_nothing_is_left_of_a_folder_that_was_not_finished(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        fill_and_fail(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_no_folder_of_a_user_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    require_empty(out)
    with pytest.raises(OSError, match="not empty"):
        fill_meanwhile(out)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
    with pytest.raises(UserError, match="exists and is not empty"):
        require_empty(out)


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_or_left(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file"
    with file_by_rename(path, durable=durable) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError):
        write_and_fail(path, durable=durable)
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("file", b"old")]


def test_why_nothing_can_be_written(tmp_path: Path) -> None:
    assert why_unwritable(tmp_path) is None
    assert not [*tmp_path.iterdir()]
    assert why_unwritable(tmp_path / "gone") == "No such file or directory"
