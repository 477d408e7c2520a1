"""What a save costs training: ours against DeepSpeed's own checkpoint and torch's DCP, on the same state.

Also what only reading its weights, a third of it, costs through DeepSpeed's fragment API, where we take views.

    PYTHONPATH=. python tests/benchmarks/saves.py --model .cache/SmolLM2-135M-Instruct

LoRA: one process of ZeRO-2, a save at every step; the stall is the time that a step spends in `save` and `advance`.
Full: every weight of the model; each of our saves is let finish, then DeepSpeed and DCP save the same state in turn.
The last line is how many times longer a synchronous DeepSpeed save of it holds training up.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import duel

STEPS = 12
WARM_UP = 2


def write_run(kind: str, model: str, dtype: Any, folder: Path) -> Path:
    """A run folder with one stage of full or LoRA training; returns the stage's folder."""
    from tests.faults.ranks import write_run

    from ftlaunch.recipe.adapter import Full, Lora
    from ftlaunch.recipe.data import Data
    from ftlaunch.recipe.model import Model
    from ftlaunch.recipe.recipe import Recipe
    from ftlaunch.recipe.stages import Parallel, Sft

    rows = folder / "rows.jsonl"
    texts = [f"{number} " + "the quick brown fox jumps over the lazy dog " * 12 for number in range(200)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = Recipe(
        name=kind,
        model=Model(path=model, dtype=dtype),
        adapter=Lora() if kind == "lora" else Full(),
        data={"rows": Data(path=str(rows), format="text", train_on="all")},
        stage=[Sft(data="rows", steps=STEPS, batch_size=8 if kind == "lora" else 2, save_every=1, keep=1)],
        parallel=Parallel(strategy="zero2", device="cpu"),
    )
    return write_run(recipe, folder / "run").stage_dir("01-sft").path


def rank(step: str, scratch: str) -> None:
    """Run the stage in this process and print what each save cost, in seconds."""
    from fttrain import __main__ as trainer
    from fttrain.checkpoint.store import Checkpoints

    spent: list[float] = []
    stalls = [0.0] * (STEPS + 1)
    acts = {"DeepSpeed": save_deepspeed, "DCP": save_dcp, "fragments": read_fragments}
    others: dict[str, list[float]] = {name: [] for name in acts}
    save, advance = Checkpoints.save, Checkpoints.advance
    full = "full" in step

    def timed_advance(self: Checkpoints) -> None:
        began = time.perf_counter()
        advance(self)
        spent.append(time.perf_counter() - began)

    def timed_save(self: Checkpoints, number: int, *arguments: Any, **named: Any) -> None:
        began = time.perf_counter()
        save(self, number, *arguments, **{**named, "is_last": False})
        stalls[number] = spent[0] + time.perf_counter() - began  # the loop's own call comes first
        if full or number == STEPS:
            self._wait(None)
        spent.clear()
        if full:
            for name, act in acts.items():
                began = time.perf_counter()
                act(self._engine, Path(scratch) / name / str(number))
                others[name].append(time.perf_counter() - began)

    Checkpoints.save, Checkpoints.advance = timed_save, timed_advance
    sys.argv = ["fttrain", step]
    assert trainer.main() == 0
    print(json.dumps({"stalls": stalls[1:], **others}))


def save_deepspeed(engine: Any, folder: Path) -> None:
    engine._wrapped.save_checkpoint(str(folder))


def save_dcp(engine: Any, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    from fttrain.checkpoint import shards

    dcp.save({piece.key: piece.tensor for piece in shards.owned(engine)}, checkpoint_id=str(folder))


def read_fragments(engine: Any, _folder: Path) -> None:
    from deepspeed.utils import safe_get_full_fp32_param

    for _, parameter in engine.trained_parameters():
        safe_get_full_fp32_param(parameter)


def measure(kind: str, model: str, dtype: str) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of every save, and of every step."""
    with tempfile.TemporaryDirectory(prefix=f"saves-{kind}-") as folder:
        step = write_run(kind, model, dtype, Path(folder))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(step / "accelerate.yaml")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
        done = subprocess.run(
            [*command, __file__, "--rank", str(step), folder],
            cwd=step.parent,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        lines = [json.loads(line) for line in (step / "metrics.jsonl").read_text().splitlines()]
        times = [line["time"] for line in lines if "loss" in line]
        assert all(line["grad_norm"] > 0 for line in lines if "loss" in line)
        return json.loads(done.stdout.splitlines()[-1]), [after - before for before, after in pairwise(times)]


def show(name: str, seconds: list[float]) -> float:
    """Print a line and return the median after warm-up."""
    counted = seconds[WARM_UP:]
    middle = statistics.median(counted)
    figures = {"median": middle, "worst": max(counted), "first": seconds[0]}
    print(f"{name:34s}", *(f"{label} {value * 1000:8.1f} ms" for label, value in figures.items()), sep="  ")
    return middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--kind", choices=["lora", "full"])
    duel.add_dtype(parser)
    options = parser.parse_args()
    model, dtype = str(Path(options.model).resolve()), duel.dtype_of(options)
    if options.kind != "full":
        compare_lora(model, dtype)
    if options.kind != "lora":
        compare_full(model, dtype)


def compare_lora(model: str, dtype: str) -> None:
    saves, steps = measure("lora", model, dtype)
    step = show("LoRA: a step, with its save", steps)
    stall = show("LoRA: what its save holds up", saves["stalls"])
    print(f"LoRA: {stall / step:.2%} of a step")


def compare_full(model: str, dtype: str) -> None:
    saves, _ = measure("full", model, dtype)
    ours = show("full: what a save of ours holds up", saves["stalls"])
    theirs = show("full: DeepSpeed's save", saves["DeepSpeed"])
    show("full: torch's DCP save", saves["DCP"])
    show("full: reading by the fragment API", saves["fragments"])
    print(f"full: {ours / theirs:.1%} of DeepSpeed's")
    print(f"ratio {theirs / ours:.2f}")


if __name__ == "__main__":
    if "--rank" in sys.argv:
        rank(*sys.argv[2:])
    else:
        main()
