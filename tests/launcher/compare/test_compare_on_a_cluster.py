"""Trials as jobs of a cluster, by a SLURM that refuses some of them for want of room."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.launcher.backend.slurm.conftest import slurm  # noqa: F401 - a fixture
from tests.launcher.scripted_runs import Text, make_plan

from ftlaunch.backend import backends
from ftlaunch.backend.protocol import Say
from ftlaunch.backend.slurm import lanes, paths
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.compare import runner
from ftlaunch.errors import DONE, STAGE_FAILED, UserError
from ftlaunch.run.layout import RunDir


@pytest.fixture
def trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(lanes, "LOOK_SECONDS", 0.0)
    folders = [tmp_path / name for name in ("a", "b", "c")]
    return [
        SimpleNamespace(
            plan=make_plan(folder, "train"),
            loaded=Text(tmp_path / "recipe.toml"),
            variant=SimpleNamespace(label=folder.name),
            seed=1,
        )
        for folder in folders
    ]


def conduct(trials: list[Any], at_once: int | None, say: Say) -> int:
    return runner.conduct(trials, backends.on(Cluster()), at_once, say)


def finish(trials: list[Any]) -> None:
    """Have every job that is in the queue end with its stage done."""
    for trial in trials:
        stage_dir = RunDir(Path(trial.plan.run_dir)).stage_dir("01-sft")
        if paths.job(stage_dir).exists():
            stage_dir.result.write_text("{}")


def test_so_many_run_at_once_and_all_are_waited_for(trials: list[Any], slurm: Path) -> None:  # noqa: F811
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        finish(trials)

    assert conduct(trials, 2, say) == DONE
    assert (slurm / "waits").read_text() == "100\n101\n102 afterany:100\n"
    assert said == ["3 trials: 2 queued, 1 waiting", "3 trials: 3 done"]


def test_what_slurm_does_not_take_yet_is_submitted_later(trials: list[Any], slurm: Path) -> None:  # noqa: F811
    (slurm / "refused").write_text("2")
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        finish(trials)
        if "1 not submitted yet" in line:
            (slurm / "refused").unlink(missing_ok=True)

    assert conduct(trials, None, say) == DONE
    assert [line for line in said if "1 not submitted yet" in line]


def test_a_trial_that_fails_is_told(trials: list[Any], slurm: Path) -> None:  # noqa: F811
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        finish(trials[1:])
        queue = slurm / "queue"
        queue.write_text(queue.read_text().replace("100\x1fPENDING", "100\x1fFAILED"))

    assert conduct(trials, None, say) == STAGE_FAILED
    assert said[-1].startswith(f"{trials[0].plan.run_dir} is failed")


def test_a_folder_that_holds_another_run_is_left_alone(trials: list[Any], slurm: Path) -> None:  # noqa: F811
    assert slurm.exists()
    runner._folder(trials[0], backends.on(Cluster()))
    trials[0].plan = make_plan(Path(trials[0].plan.run_dir), "train", seed=2)
    with pytest.raises(UserError, match="holds a run of another recipe"):
        conduct(trials, None, print)
