"""What may be loaded or run: the owner, the mode, and where it lies."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.launcher import scripted_runs

from ftlaunch.backend import backends
from ftlaunch.errors import UserError
from ftlaunch.safety import trust

STRANGER = 65533
"""Nobody's number."""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of two users")


def model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_what_is_ours_may_be_loaded(tmp_path: Path):
    folder = model(tmp_path / "model")
    trust.require(folder)
    trust.require(folder / "config.json")
    trust.require(tmp_path / "nothing")


@pytest.mark.parametrize(("mode", "who"), [(0o777, "everyone"), (0o757, "everyone")])
def test_a_folder_that_everyone_may_write_is_refused(tmp_path: Path, mode: int, who: str):
    folder = model(tmp_path / "model")
    folder.chmod(mode)
    with pytest.raises(UserError, match=f"can be written by .*{who}") as refused:
        trust.require(folder)
    subprocess.run(refused.value.remedy, shell=True, check=True)
    trust.require(folder)


def test_a_file_in_it_that_everyone_may_write_is_refused(tmp_path: Path):
    folder = model(tmp_path / "model")
    (folder / "config.json").chmod(0o666)
    with pytest.raises(UserError, match=r"config\.json can be written by"):
        trust.require(folder)


def test_folders_below_count_where_they_are_loaded_too(tmp_path: Path):
    run = model(tmp_path / "run")
    below = model(run / "01-sft") / "config.json"
    below.chmod(0o666)
    trust.require(run)
    with pytest.raises(UserError, match="01-sft/config"):
        trust.require(run, deep=True)


def test_a_link_is_judged_by_what_it_leads_to(tmp_path: Path):
    folder, elsewhere = model(tmp_path / "model"), model(tmp_path / "elsewhere")
    (folder / "weights").symlink_to(elsewhere / "config.json")
    (tmp_path / "link").symlink_to(folder)
    trust.require(tmp_path / "link")
    elsewhere.chmod(0o777)  # so anybody could put another file there
    with pytest.raises(UserError, match="elsewhere can be written by"):
        trust.require(tmp_path / "link")


def test_a_folder_further_up_must_keep_strangers_from_swapping(tmp_path: Path):
    shared = tmp_path / "shared"
    shared.mkdir()
    folder = model(shared / "model")
    shared.chmod(0o777)
    for judged in (lambda: trust.require(folder), lambda: trust.require_place(shared / "run")):
        with pytest.raises(UserError, match="everyone may write to"):
            judged()
    shared.chmod(0o1777)  # sticky, as /tmp is: only the owner may rename
    trust.require(folder)
    shared.chmod(0o775)  # a group's folder: what its members put there would be theirs
    trust.require(folder)


def test_a_group_of_ones_own_is_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import grp
    import pwd

    folder = model(tmp_path / "model")
    folder.chmod(0o775)
    status = folder.stat()
    user, name = pwd.getpwuid(status.st_uid), "alone"
    monkeypatch.setattr(pwd, "getpwuid", lambda _: pwd.struct_passwd((name, "x", user[2], status.st_gid, *user[4:])))
    for members, private in ([[], True], [["alone"], True], [["alone", "other"], False]):
        trust._is_private_group.cache_clear()
        monkeypatch.setattr(grp, "getgrgid", lambda _, m=members: grp.struct_group((name, "x", status.st_gid, m)))
        if private:
            trust.require(folder)
        else:
            with pytest.raises(UserError, match="its group"):
                trust.require(folder)
    trust._is_private_group.cache_clear()


@needs_root
def test_what_another_user_owns_is_refused_and_roots_is_not(tmp_path: Path):
    folder = model(tmp_path / "model")
    os.chown(folder / "config.json", STRANGER, STRANGER)
    with pytest.raises(UserError, match=f"belongs to .*{STRANGER}|belongs to nobody") as refused:
        trust.require(folder)
    subprocess.run(refused.value.remedy.partition(": ")[2], shell=True, check=True)
    trust.require(folder)


@needs_root
def test_another_user_may_load_roots_models_and_its_own_but_no_third_ones():
    """A process with a uid of its own, in a place that it can reach."""
    place = Path("/tmp") / f"ftlaunch-trust-{os.getpid()}"
    place.mkdir(mode=0o755)
    try:
        models = [model(place / name) for name in ("roots", "own", "thirds")]
        for folder, owner in zip(models, (0, STRANGER, STRANGER - 1), strict=True):
            for path in (folder, folder / "config.json"):
                os.chown(path, owner, owner)
        assert said_as(STRANGER, models) == ["fine", "fine", "belongs to another"]
    finally:
        shutil.rmtree(place)


def said_as(user: int, models: list[Path]) -> list[str]:
    """What `require` says of each in a forked process of that user."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            os.write(writer, "\n".join(map(said, models)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        return pipe.read().splitlines()


def said(path: Path) -> str:
    try:
        trust.require(path)
    except UserError as error:
        return "belongs to another" if "belongs to" in error.message else error.message
    return "fine"


def test_a_run_that_others_may_write_is_not_driven(tmp_path: Path):
    run = scripted_runs.write_run(tmp_path / "run", "train")
    planted = run.stage_dir("01-sft").path / "step.json"
    planted.chmod(0o666)
    with pytest.raises(UserError, match=r"step\.json can be written by .*everyone"):
        backends.driven(run).drive(run)
    assert not run.lock.exists()
    planted.chmod(0o600)
    assert backends.driven(run).drive(run) == 0


def test_a_run_is_not_made_where_anybody_could_swap_it(tmp_path: Path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(UserError, match="everyone may write to"):
        scripted_runs.write_run(shared / "run", "train")
    assert not list(shared.iterdir())


def test_whatever_the_umask_a_run_is_private(tmp_path: Path):
    before = os.umask(0)
    try:
        trust.write_for_ourselves()
        run = scripted_runs.write_run(tmp_path / "run", "train")
        assert backends.driven(run).drive(run) == 0
    finally:
        os.umask(before)
    assert run.path.stat().st_mode & 0o777 == 0o700
    trust.require(run.path)
