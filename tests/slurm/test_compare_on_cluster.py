"""Trials as jobs: some at once, killed in the middle, finished by asking again."""

import multiprocessing
import os
import signal
from pathlib import Path
from unittest.mock import patch

from scheduled import NOWHERE, ScriptedRun, _plan, _Text, slurm
from test_untidy import in_queue, wait_until

from ftlaunch.backend import backends
from ftlaunch.backend.slurm import lanes
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.compare import runner
from ftlaunch.compare.variants import Trial, Variant
from ftlaunch.errors import DONE, STAGE_FAILED
from ftlaunch.run.layout import RunDir


def trial(folder: Path, name: str, *stages: str) -> Trial:
    plan = _plan(folder / name, 1, stages)
    loaded = _Text(folder / "recipe.toml")
    return Trial(Variant(name, folder / "recipe.toml", ()), 1, plan, loaded)  # pyright: ignore[reportArgumentType]


def conduct(trials: list[Trial], cluster: Cluster) -> int:
    with patch("ftlaunch.run.provenance.collect", return_value=NOWHERE), patch.object(lanes, "LOOK_SECONDS", 0.5):
        return runner.conduct(trials, backends.on(cluster), 2, print)


def test_trials_go_on_without_their_caller_and_are_finished_by_asking_again(dev: Cluster, tmp_path: Path) -> None:
    trials = [trial(tmp_path, f"t{number}", "15 0.1 none") for number in range(4)]
    folders = [RunDir(Path(one.plan.run_dir)) for one in trials]
    caller = multiprocessing.get_context("fork").Process(target=conduct, args=(trials, dev))
    caller.start()
    wait_until(lambda: folders[0].stage_dir("01-sft").result.exists())
    assert caller.pid is not None
    os.kill(caller.pid, signal.SIGKILL)
    caller.join()
    slurm("scancel", *in_queue(folders[3].path))
    assert conduct(trials, dev) == DONE
    made = [len(ScriptedRun(folder, dev).ended()) for folder in folders]
    assert made[0] == 1
    assert all(ScriptedRun(folder, dev).is_calm() for folder in folders)


def test_a_trial_that_fails_does_not_end_the_others(dev: Cluster, tmp_path: Path) -> None:
    trials = [trial(tmp_path, "bad", "5 0.1 memory@2"), trial(tmp_path, "good", "5 0.1 none")]
    assert conduct(trials, dev) == STAGE_FAILED
    assert (tmp_path / "good/01-sft/result.json").exists()
