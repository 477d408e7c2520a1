"""SIGKILL at random moments, of random ranks: the run that is resumed ends with the bits of one that was left alone."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.faults.orders import Fault
from tests.faults.ranks import Ranks, said, with_parallel, write_run

from ftlaunch.recipe import Recipe
from ftlaunch.rundir import StepDir, read_jsonl

SETTINGS = ("stage.sft.steps=24", "stage.sft.save_every=3", "stage.sft.evaluate_every=7", "stage.sft.batch_size=8")
SHAPES = (("ddp", 1), ("ddp", 2), ("zero1", 1), ("zero1", 2), ("zero2", 1), ("zero2", 2), ("zero3", 1), ("zero3", 2))
VOLATILE = {"time", "tokens_per_second", "peak_memory_bytes"}


def outcome(step: StepDir) -> dict[str, Any]:
    """Digests of adapter, moments and random states, and every metric that no clock decides."""
    last = json.loads((max(step.checkpoints.glob("step-*")) / "manifest.json").read_text())
    metrics = [{key: line[key] for key in line if key not in VOLATILE} for line in read_jsonl(step.metrics)]
    return {"files": last["files"], "state": last["state"], "metrics": metrics}


def written(load: Callable[..., Recipe], shape: tuple[str, int], folder: Path) -> StepDir:
    return write_run(with_parallel(load(*SETTINGS, dropout=0.1), *shape), folder).step_dir("01-sft")


def kill_somewhere(step: StepDir, ranks: Ranks, draw: random.Random, seconds: float) -> None:
    """Start the step and kill one of its ranks at a moment of its life, or right behind a save that was begun."""
    world = step.read_step().world_size
    rank = draw.randrange(world)
    if draw.random() < 0.3:
        ranks.start(step, Fault("kill", step=draw.randrange(3, 24, 3), rank=rank, at="save"))
    else:
        ranks.start(step)
        time.sleep(draw.uniform(0.2, seconds))
        ranks.kill(rank)
    ranks.wait()


@pytest.fixture(scope="module")
def calm(load: Callable[..., Recipe], ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Outcome and seconds of a run that nothing happens to, once for each strategy and number of ranks."""
    known: dict[tuple[str, int], tuple[dict[str, Any], float]] = {}

    def find(shape: tuple[str, int]) -> tuple[dict[str, Any], float]:
        if shape not in known:
            step = written(load, shape, tmp_path_factory.mktemp("calm") / "run")
            began = time.monotonic()
            ranks.run(step)
            known[shape] = outcome(step), time.monotonic() - began
        return known[shape]

    return find


def test_a_killed_run_ends_as_if_it_had_not_been(
    load: Callable[..., Recipe],
    ranks: Ranks,
    calm: Callable[..., Any],
    trials: Callable[[int, int], int],
    tmp_path: Path,
):
    draw = random.Random(11)
    shapes = SHAPES if trials(0, 1) else (("ddp", 2), ("zero3", 2))
    for trial in range(trials(4, 200)):
        shape = shapes[trial % len(shapes)]
        expected, seconds = calm(shape)
        step = written(load, shape, tmp_path / str(trial))
        kill_somewhere(step, ranks, draw, seconds)
        if not step.result.exists():  # it may have been killed after its end
            ranks.run(step)
        assert outcome(step) == expected, (trial, shape, said(step))
        print(f"trial {trial + 1}: {shape[0]} × {shape[1]}: equal after {len(step.all_attempts())} starts", flush=True)
