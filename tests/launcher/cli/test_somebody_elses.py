"""A run of somebody else: who may read its folder sees how it stands, and what would write there is refused."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from tests.launcher.scripted_runs import write_run

from ftlaunch import cli
from ftlaunch.backend import control, runs
from ftlaunch.backend.slurm import paths, queue
from ftlaunch.backend.slurm.queue import Job
from ftlaunch.cli.run import resume
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import UserError
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import RunDir
from ftlaunch.watch.status import read_status

NOBODY = 65534
SQUEUE = "#!/bin/sh\ncase \"$*\" in *--user=0,{nobody}*) printf '{row}' ;; esac\n"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[RunDir]:
    """A run of root's, job 7, that everybody may read, looked at as nobody; squeue tells of root's jobs where asked."""
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    folder = Path(tempfile.mkdtemp(prefix="ftlaunch-test-"))
    run = write_run(folder / "r", "train")
    write_json(paths.cluster(run), Cluster())
    write_json(paths.job(run.stage_dir("01-sft")), Job(id="7", submitted=0.0))
    row = ["7", "RUNNING", "None", "n1", "N/A", "r/01-sft", str(run.path), f"{run.path}/01-sft/jobs/7.sh"]
    (folder / "squeue").write_text(SQUEUE.format(nobody=NOBODY, row=queue.SEPARATOR.join(row) + "\\n"))
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    import_module("ftlaunch.backend.slurm.backend")  # nobody may not read where Python lies, if that is root's home
    os.seteuid(NOBODY)
    yield run
    os.seteuid(0)
    shutil.rmtree(folder)


def test_what_would_write_into_it_is_refused_with_its_owners_name(run: RunDir) -> None:
    assert read_status(run).state == "running"
    for verb in (control.cancel, lambda one: control.ask_to_stop(one, 0), lambda one: resume(str(one.path))):
        with pytest.raises(UserError, match="is the run of root, and you may not write there"):
            verb(run)


def test_what_may_not_be_read_is_named(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    os.seteuid(0)
    run.path.chmod(0o700)
    os.seteuid(NOBODY)
    monkeypatch.setattr(runs, "HOME", run.path.parent)
    assert runs.all_runs() == []
    monkeypatch.setattr("sys.argv", ["ftlaunch", "status", str(run.path)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(
        f"error: {run.path}/plan.json: Permission denied\n  → you may not use it so: ask its owner"
    )
