"""Asking a controller that is being started again."""

from pathlib import Path

import pytest
from tests.launcher.acted import write_run

from ftlaunch.backend.slurm import requeue
from ftlaunch.cluster.queue import Job
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import UserError
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import RunDir

SQUEUE = """\
#!/bin/sh
echo asked >> {notes}
[ $(wc -l < {notes}) -gt {failures} ] || {{ echo "Unable to contact slurm controller" >&2; exit 1; }}
echo "7|RUNNING|None|n1|N/A|1:00"
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run whose first stage is job 7, where a question may be asked again at once."""
    monkeypatch.setattr(requeue, "ASK_AGAIN_SECONDS", 0.0)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    run = write_run(tmp_path / "r", "train")
    write_json(run.cluster, Cluster())
    write_json(run.step_dir("01-sft").job, Job(id="7", submitted=0.0))
    return run


def speak(folder: Path, failures: int) -> None:
    """Have `squeue` fail so often before it answers."""
    squeue = folder / "squeue"
    squeue.write_text(SQUEUE.format(notes=folder / "notes", failures=failures))
    squeue.chmod(0o700)


def test_a_controller_that_comes_back_is_asked_until_it_answers(run: RunDir, tmp_path: Path) -> None:
    speak(tmp_path, failures=3)
    assert requeue.job_state(run, "7") == "RUNNING"


def test_a_controller_that_stays_away_is_given_up(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requeue, "PATIENCE_SECONDS", 0.2)
    speak(tmp_path, failures=10**6)
    with pytest.raises(UserError, match="Unable to contact"):
        requeue.job_state(run, "7")
