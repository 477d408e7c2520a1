"""Asking a controller that is being started again."""

from pathlib import Path

import pytest
from tests.launcher.scripted_runs import write_run

from ftlaunch.backend.slurm import paths, requeue
from ftlaunch.backend.slurm.queue import Job
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import UserError
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import RunDir

SCONTROL = """\
#!/bin/sh
echo asked >> {notes}
[ $(wc -l < {notes}) -gt {failures} ] || {{ echo "{words}" >&2; exit 1; }}
echo "*** the site says hello ***"
echo "JobId=$3 JobName=r/01-sft"
echo "   JobState=RUNNING Reason=None Dependency=(null)"
echo "   WorkDir={folder}"
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run whose first stage is job 7, where a question may be asked again at once."""
    monkeypatch.setattr(requeue, "ASK_AGAIN_SECONDS", 0.0)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    run = write_run(tmp_path / "r", "train")
    write_json(paths.cluster(run), Cluster())
    write_json(paths.job(run.stage_dir("01-sft")), Job(id="7", submitted=0.0))
    return run


def speak(folder: Path, failures: int, words: str = "Unable to contact slurm controller (connect failure)") -> None:
    """Have `scontrol` fail so often, with such words, before it answers; a site's own line comes before the answer."""
    scontrol = folder / "scontrol"
    scontrol.write_text(SCONTROL.format(notes=folder / "notes", failures=failures, words=words, folder=folder / "r"))
    scontrol.chmod(0o700)


def test_a_controller_that_comes_back_is_asked_until_it_answers(run: RunDir, tmp_path: Path) -> None:
    speak(tmp_path, failures=3)
    assert requeue.job_state(run, "7") == "RUNNING"


def test_a_controller_is_waited_for_as_long_as_the_job_lives(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requeue, "PATIENCE_SECONDS", 0.0)
    speak(tmp_path, failures=5)
    assert requeue.job_state(run, "7") == "RUNNING"


def test_a_strangers_job_of_the_same_id_is_not_put_back(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A controller that has lost its state gives the id of this job to the next one that comes."""
    monkeypatch.setattr(requeue, "PATIENCE_SECONDS", 0.0)
    speak(tmp_path, failures=0)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(scontrol.read_text().replace(f"WorkDir={tmp_path}/r", "WorkDir=/home/me"))
    with pytest.raises(UserError, match="does not know this job, 7, any more"):
        requeue.job_state(run, "7")


def test_a_controller_that_refuses_is_given_up(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requeue, "PATIENCE_SECONDS", 0.2)
    speak(tmp_path, failures=10**6, words="Access denied")
    with pytest.raises(UserError, match="Access denied"):
        requeue.job_state(run, "7")
