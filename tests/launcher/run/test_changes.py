"""What a run began with is compared with what is there: by digests, which are taken once for a file that stays."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.cli.run import start
from ftlaunch.errors import DONE, UserError
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.recipe.stages import Merge
from ftlaunch.run import digests
from ftlaunch.run.changes import accept, changes, require_unchanged
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import RunDir
from ftlaunch.run.provenance import collect


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    base, rows = tmp_path / "base", tmp_path / "rows"
    base.mkdir()
    rows.mkdir()
    (base / "model.safetensors").write_bytes(b"weights")
    (base / "README.md").write_text("nothing that counts")
    (rows / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    data = Data(path=str(rows), format="text", template=str(tmp_path / "t.jinja"))
    recipe = Recipe(name="r", model=Model(path=str(base)), stage=[Merge()], data={"rows": data})
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    write_json(run.resolved, recipe)
    write_json(run.provenance, collect(recipe, tmp_path / "recipe.toml"))
    return run


def edit(run: RunDir, name: str, content: str) -> None:
    """Change a file and give it the times that it had."""
    path = run.path.parent / name
    stat = path.stat()
    path.write_text(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_what_stays_is_not_told(run: RunDir):
    (run.path.parent / "base/README.md").write_text("other words")
    os.utime(run.path.parent / "base/model.safetensors")
    assert changes(run) == []
    require_unchanged(run)


@pytest.mark.parametrize(
    ("name", "content"),
    [("base/model.safetensors", "WEIGHTS"), ("rows/a.jsonl", '{"text": "two"}\n'), ("t.jinja", "{{ Messages }}")],
)
def test_an_edit_is_told_also_where_size_and_time_are_the_same(name: str, content: str, run: RunDir):
    edit(run, name, content)
    path = run.path.parent / name
    assert changes(run) == [f"{path} has changed since the run began"]
    with pytest.raises(UserError, match="has changed since the run began") as caught:
        require_unchanged(run)
    assert caught.value.remedy.endswith(f"ftlaunch resume {run.path} --changed")


def test_asking_for_a_finished_run_again_tells_it(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("ftlaunch.backend.runs.finished", lambda _: True)
    assert start(run, detach=True) == DONE
    assert "since" not in capsys.readouterr().err
    edit(run, "rows/a.jsonl", '{"text": "two"}\n')
    assert start(run, detach=True) == DONE
    said = capsys.readouterr().err
    assert "a.jsonl has changed since the run began\n  → it is not trained again under this name" in said


def test_files_that_come_and_go_are_told(run: RunDir):
    rows = run.path.parent / "rows"
    (rows / "b.jsonl").write_text('{"text": "more"}\n')
    assert changes(run) == [f"{rows / 'b.jsonl'} has been added since the run began"]
    (rows / "a.jsonl").unlink()
    (rows / "b.jsonl").unlink()
    assert changes(run) == [f"{rows / 'a.jsonl'} is gone since the run began"]


def test_what_is_accepted_is_what_the_run_goes_on_with(run: RunDir):
    edit(run, "rows/a.jsonl", '{"text": "two"}\n')
    assert len(accept(run)) == 1
    assert changes(run) == accept(run) == []


def test_runs_of_earlier_versions_recorded_no_base(run: RunDir):
    content = run.provenance.read_text()
    start = content.index('"base"')
    run.provenance.write_text(content[:start].rstrip().rstrip(",") + "}")
    edit(run, "base/model.safetensors", "WEIGHTS")
    assert changes(run) == []


def test_large_files_that_are_not_known_are_left_alone_where_asked(run: RunDir):
    edit(run, "base/model.safetensors", "WEIGHTS" * 100)
    assert changes(run, at_most=100) == []
    assert len(changes(run, at_most=1000)) == 1


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, reads = tmp_path / "large", 0
    path.write_text("content")
    real = Path.open

    def counting(self: Path, *arguments: Any, **named: Any) -> Any:
        nonlocal reads
        reads += self == path
        return real(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", counting)
    now = time.time()
    first = digests.sha256(path)
    assert not digests.is_kept(path), "it was written a moment ago, and might be again"
    monkeypatch.setattr(time, "time", lambda: now + 10)
    assert [digests.sha256(path) for _ in range(3)] == [first] * 3
    assert reads == 2
    assert digests.is_kept(path)
    path.write_text("another")
    assert digests.sha256(path) != first


def test_a_home_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cache").write_text("no folder")
    path = tmp_path / "file"
    path.write_text("content")
    monkeypatch.setattr(time, "time", lambda now=time.time(): now + 10)
    assert digests.sha256(path) == digests.sha256(path)
