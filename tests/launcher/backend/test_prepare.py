"""Writing a run folder: all of it or nothing."""

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from tests.launcher.scripted_runs import Text, make_plan, write_run

from ftlaunch.backend import backends
from ftlaunch.backend import prepare as prepare_module
from ftlaunch.backend.prepare import prepare
from ftlaunch.errors import UserError
from ftlaunch.plan.plan import Plan
from ftlaunch.processes import lock
from ftlaunch.run.files import write_atomic


def test_what_was_planned_is_what_is_written(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "runs/r", "train", "fail")
    run = prepare(plan, Text(tmp_path / "recipe.toml", "# as written\n"), backends.on(None))
    assert run.path == tmp_path / "runs/r"
    assert run.recipe.read_text() == "# as written\n"
    assert msgspec.json.decode(run.plan.read_bytes(), type=Plan) == plan
    assert msgspec.json.decode(run.resolved.read_bytes(), type=type(plan.recipe)) == plan.recipe
    assert [stage_dir.step.read_text() for stage_dir in run.stage_dirs()] == [
        planned.files["step.json"] for planned in plan.stages
    ]
    assert run.provenance.exists()
    assert list((tmp_path / "runs").iterdir()) == [run.path]


@pytest.mark.parametrize("mask", [0o000, 0o777])
def test_folders_are_the_owners_alone_under_any_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        run = write_run(tmp_path / "r", "train")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (run.path, run.path / "01-sft")}
    assert modes == {0o700}


def test_a_folder_with_another_recipe_is_left_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train")
    before = run.plan.read_bytes()
    with pytest.raises(UserError, match="holds another recipe"):
        prepare(make_plan(tmp_path / "r", "train", seed=2), Text(tmp_path), backends.on(None))
    assert run.plan.read_bytes() == before


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        write_run(tmp_path / "r", "train")


def test_an_unfinished_run_is_to_be_resumed(tmp_path: Path) -> None:
    write_run(tmp_path / "r", "train")
    with pytest.raises(UserError) as caught:
        write_run(tmp_path / "r", "train")
    assert caught.value.remedy == f"go on with it: ftlaunch resume {tmp_path}/r"


def test_a_running_run_is_to_be_watched(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train")
    held = lock.take(run)
    with pytest.raises(UserError, match="already running"):
        write_run(tmp_path / "r", "train")
    lock.release(held)


def test_a_finished_run_is_found_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "train")
    run.stage_dir("01-sft").result.write_text("{}")
    assert write_run(tmp_path / "r", "train").path == run.path


def test_nothing_is_left_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(prepare_module, "write_json", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write_run(tmp_path / "r", "train")
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_no_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_run(tmp_path / "file/r", "train")


def test_a_file_may_be_written_from_two_nodes_at_once(tmp_path: Path) -> None:
    """Whose processes may have the same number."""
    path = tmp_path / "stop"
    with ThreadPoolExecutor(4) as pool:
        for _ in range(50):
            list(pool.map(write_atomic, [path] * 4, ["asked" * 1000] * 4))
    assert path.read_text() == "asked" * 1000
    assert [path.name for path in tmp_path.iterdir()] == ["stop"]
