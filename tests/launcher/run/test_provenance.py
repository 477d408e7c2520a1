"""Where a run came from."""

import hashlib
import os
import subprocess
from pathlib import Path

import msgspec
import pytest

from ftlaunch import __version__
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.recipe.stages import Merge
from ftlaunch.run.provenance import collect

ENVIRONMENT = {
    **{f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    **{"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": os.devnull},
}


def recipe(**data: Path | str) -> Recipe:
    tables = {name: Data(path=str(path), format="text") for name, path in data.items()}
    return Recipe(name="r", model=Model(path="m"), stage=[Merge()], data=tables)


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    source = tmp_path / "recipe.toml"
    source.write_text("# one\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    return source


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    found = collect(recipe(), checkout)
    assert found.commit == git(checkout.parent, "rev-parse", "HEAD")
    assert found.diff_sha256 is None


def test_a_change_that_is_not_committed_shows(checkout: Path) -> None:
    checkout.write_text("# two\n")
    first = collect(recipe(), checkout).diff_sha256
    checkout.write_text("# three\n")
    second = collect(recipe(), checkout).diff_sha256
    assert first
    assert second
    assert first != second


def test_a_checkouts_own_programs_are_not_run(checkout: Path) -> None:
    ran = checkout.parent / "ran"
    program = checkout.parent / "program.sh"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    checkout.write_text("# two\n")
    (checkout.parent / ".gitattributes").write_text("*.toml diff=evil\n")
    for key in ("diff.external", "diff.evil.command", "diff.evil.textconv", "core.fsmonitor"):
        git(checkout.parent, "config", key, str(program))
    assert collect(recipe(), checkout).diff_sha256
    assert not ran.exists()


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = collect(recipe(), tmp_path / "recipe.toml")
    assert (found.commit, found.diff_sha256) == (None, None)


def test_without_git_there_is_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert collect(recipe(), checkout).commit is None


def test_versions_are_those_installed(tmp_path: Path) -> None:
    assert collect(recipe(), tmp_path / "r.toml").packages["ftlaunch"] == __version__


def test_local_data_is_fingerprinted_and_hub_data_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = [tmp_path / "one.jsonl", tmp_path / "many/a.csv", tmp_path / "many/deep/b.parquet"]
    for file in (*files, tmp_path / "many/README.md", tmp_path / "org/set/c.csv"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    found = collect(recipe(one=files[0], many=tmp_path / "many", hub="org/set"), tmp_path / "r.toml").data
    assert found == {str(file): hashlib.sha256(file.name.encode()).hexdigest() for file in sorted(files)}


def test_no_secret_of_the_environment_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_keep_me")
    monkeypatch.setattr("sys.argv", ["ftlaunch", "run", "--set", "token=hf_do_not_keep_me"])
    assert b"hf_do_not_keep_me" not in msgspec.json.encode(collect(recipe(), tmp_path / "r.toml"))
