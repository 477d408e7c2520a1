"""SIGKILL at random moments, of random ranks: the run that is resumed ends with the bits of one that was left alone."""

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.faults.rank_faults import Fault
from tests.faults.ranks import Ranks, said, with_parallel, write_run

from ftlaunch.recipe.recipe import Recipe
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir

SHAPES = (("ddp", 1), ("ddp", 2), ("zero1", 1), ("zero1", 2), ("zero2", 1), ("zero2", 2), ("zero3", 1), ("zero3", 2))
KINDS = ("sft", "reward", "dpo", "orpo", "ppo")
STEPS, SAVE_EVERY = 12, 3
Trial = tuple[str, tuple[str, int]]
"""(kind of stage, (strategy, ranks))."""
VOLATILE = {"time", "tokens_per_second", "peak_memory_bytes"}


def outcome(stage_dir: StageDir) -> dict[str, Any]:
    """Digests of adapter, moments and random states, and every metric that no clock decides."""
    last = json.loads((max(stage_dir.checkpoints.glob("step-*")) / "manifest.json").read_text())
    metrics = [{key: line[key] for key in line if key not in VOLATILE} for line in read_jsonl(stage_dir.metrics)]
    return {"files": last["files"], "state": last["state"], "metrics": metrics}


def written(load: Callable[..., Recipe], trial: Trial, folder: Path) -> StageDir:
    kind, shape = trial
    counts = (("steps", STEPS), ("save_every", SAVE_EVERY), ("evaluate_every", 5), ("batch_size", 8))
    settings = [f"stage.0.{key}={value}" for key, value in counts]
    recipe = with_parallel(load(*settings, kind=kind, dropout=0.0 if kind == "ppo" else 0.1), *shape)
    return write_run(recipe, folder).stage_dir(f"01-{kind}")


def kill_somewhere(stage_dir: StageDir, ranks: Ranks, draw: random.Random, seconds: float) -> None:
    """Start the step and kill one of its ranks: at a moment of its life, in a step, or while a save is written."""
    rank = draw.randrange(stage_dir.read_spec().world_size)
    place = draw.choice(["moment", "begin", "save"])
    if place == "moment":
        ranks.start(stage_dir)
        time.sleep(draw.uniform(0.2, seconds))
        ranks.kill(rank)
    elif place == "begin":
        ranks.start(stage_dir, Fault("kill", step=draw.randint(1, STEPS), rank=rank))
    else:
        ranks.start(stage_dir, Fault("kill", step=draw.randrange(SAVE_EVERY, STEPS, SAVE_EVERY), rank=rank, at="save"))
    ranks.wait()


@pytest.fixture(scope="module")
def calm(load: Callable[..., Recipe], ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Outcome and seconds of a run that nothing happens to, once for each kind of trial."""
    known: dict[Trial, tuple[dict[str, Any], float]] = {}

    def find(trial: Trial) -> tuple[dict[str, Any], float]:
        if trial not in known:
            step = written(load, trial, tmp_path_factory.mktemp("calm") / "run")
            began = time.monotonic()
            ranks.run(step)
            known[trial] = outcome(step), time.monotonic() - began
        return known[trial]

    return find


SAMPLE: list[Trial] = [("sft", ("zero3", 2)), ("dpo", ("ddp", 2)), ("reward", ("zero2", 2)), ("ppo", ("ddp", 1))]


def test_a_killed_run_ends_as_if_it_had_not_been(
    load: Callable[..., Recipe],
    ranks: Ranks,
    calm: Callable[..., Any],
    trials: Callable[[int, int], int],
    tmp_path: Path,
):
    draw = random.Random(11)
    kinds = [(kind, shape) for kind in KINDS for shape in SHAPES] if trials(0, 1) else SAMPLE
    done = 0
    while done < trials(len(SAMPLE), 200):
        trial = kinds[done % len(kinds)]
        expected, seconds = calm(trial)
        step = written(load, trial, tmp_path / "run")
        kill_somewhere(step, ranks, draw, seconds)
        if not step.result.exists():  # else it was faster than the kill, which does not count
            ranks.run(step)
            assert outcome(step) == expected, (done, trial, said(step))
            done += 1
            print(f"kill {done}: {trial[0]}, {trial[1][0]} × {trial[1][1]}: equal to the last bit", flush=True)
        shutil.rmtree(tmp_path / "run")
