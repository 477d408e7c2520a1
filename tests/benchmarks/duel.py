"""Two contenders over the same rows, each in a process of its own, started in turn: what benchmarks of steps share."""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_UP = 2
Lines = list[dict[str, float]]
"""Of each step: loss, grad_norm, seconds, and of ours the number of units (tokens, pairs) in it."""
Contender = Callable[[str, Path, list[dict[str, str]], int, str], Lines]
"""(model, adapter, rows, steps, dtype) → its lines."""


def make_parser(doc: str | None, *, kinds: list[str], steps: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", choices=kinds)
    add_dtype(parser)
    parser.add_argument("--contender", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--adapter", type=Path, help=argparse.SUPPRESS)
    return parser


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """An option for the format that is computed in; bf16 on a machine without hardware for it is 70 times slower."""
    parser.add_argument(
        "--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where it is native"
    )


def dtype_of(options: argparse.Namespace) -> str:
    """What `--dtype` stands for on this machine."""
    from fttrain.distributed.precision import computed_in

    return computed_in("bf16") if options.dtype == "auto" else options.dtype


def compete(
    script: str,
    options: argparse.Namespace,
    contenders: dict[str, Contender],
    rows_of: Callable[[str, Path, int], list[dict[str, str]]],
    *,
    kinds: list[str],
    batch: int,
    unit: str,
) -> None:
    """In a contender's process take its steps; else run the script for each in turn, and compare them."""
    if options.contender:
        rows = rows_of(options.kind, options.data, batch * options.steps)
        tell(contenders[options.contender](options.model, options.adapter, rows, options.steps, dtype_of(options)))
    else:
        fight(Path(script), options, [options.kind] if options.kind else kinds, unit=unit)


def bench_step(
    stage: Any, model: str, adapter: Any = None, *, micro_batch_size: int | None = None, dtype: Any = "bf16"
) -> Any:
    """A step of ours as a run folder would hold it: one process, an adapter (LoRA if none is given), a CPU."""
    from ftlaunch.recipe.adapter import Lora
    from ftlaunch.recipe.model import Model
    from ftlaunch.recipe.stages import Optimizer, Parallel
    from ftlaunch.run.spec import StageSpec

    return StageSpec(
        name="bench",
        stage=stage,
        model=Model(path=model, dtype=dtype),
        adapter=adapter or Lora(),
        optimizer=Optimizer(),
        parallel=Parallel(device="cpu"),
        data={},
        seed=0,
        deterministic=False,
        world_size=1,
        micro_batch_size=micro_batch_size,
        training_hash="",
    )


def take_steps(engine: Any, objective: Any, micros_of: Callable[[int], list[Any]], steps: int, unit: str) -> Lines:
    """Steps of ours, each on the micro-batches that `micros_of` lays out for it."""
    from fttrain.training.loop import _take

    lines = []
    for number in range(steps):
        started = time.perf_counter()
        micros = micros_of(number)
        weight = sum(map(objective.weight, micros))
        outcome = _take(objective, engine, micros, weight)
        seconds = time.perf_counter() - started
        units = sum(micro.tokens for micro in micros) if unit == "tokens" else weight
        lines.append({"loss": outcome.loss, "grad_norm": outcome.grad_norm, "seconds": seconds, unit: units})
    return lines


def take_steps_of_trl(
    trainer: type[Any],
    config: type[Any],
    model: str,
    adapter: Path,
    chat: list[Any],
    steps: int,
    dtype: str,
    **settings: Any,
) -> Lines:
    """Steps of a trainer of TRL's over rows in order: weights in `dtype`, no activation checkpointing."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.lines: Lines = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.started

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                self.lines.append({"loss": logs["loss"], "grad_norm": logs["grad_norm"], "seconds": self.seconds})

    in_order = type(trainer.__name__, (trainer,), {"_get_train_sampler": lambda *_: SequentialSampler(chat)})
    torch.set_num_threads(torch.get_num_threads())
    base = AutoModelForCausalLM.from_pretrained(model, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    with tempfile.TemporaryDirectory() as out:
        clock = Clock()
        in_order(
            model=PeftModel.from_pretrained(base, str(adapter), is_trainable=True),
            args=config(
                output_dir=out,
                max_steps=steps,
                lr_scheduler_type="constant",
                bf16=dtype == "bf16",
                use_cpu=True,
                gradient_checkpointing=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=Dataset.from_list(chat),
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[clock],
        ).train()
    return clock.lines


def make_adapter(model: str, folder: Path) -> None:
    """One fresh LoRA adapter, so that both contenders start from the same weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)


def tell(lines: Lines) -> None:
    """Child process: print a contender's lines and its peak memory as JSON."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("RESULT " + json.dumps({"lines": lines, "peak_gib": peak}))


def fight(script: Path, options: argparse.Namespace, kinds: list[str], *, unit: str) -> None:
    """Run the script's contenders on each kind of data; the last line printed is the worst ratio of speed."""
    with tempfile.TemporaryDirectory() as folder:
        make_adapter(options.model, Path(folder))
        ratios = {kind: _race(script, options, kind, Path(folder), unit) for kind in kinds}
    for kind, (speed, memory) in ratios.items():
        print(f"{kind}: ratio {speed:.2f}, peak memory {memory:.2f} of TRL's")
    print(f"ratio {min(speed for speed, _ in ratios.values()):.2f}")


def _race(script: Path, options: argparse.Namespace, kind: str, adapter: Path, unit: str) -> tuple[float, float]:
    """Both contenders in turn on one kind of data; prints the comparison, returns the ratios of speed and memory."""
    results: dict[str, list[dict]] = {"ours": [], "trl": []}
    for _ in range(options.rounds):
        for contender, runs in results.items():
            flags = ["--contender", contender, "--kind", kind, "--adapter", str(adapter), "--steps", str(options.steps)]
            flags += ["--dtype", options.dtype]
            command = [sys.executable, str(script), *flags, "--model", options.model, "--data", str(options.data)]
            out = subprocess.run(command, capture_output=True, text=True, check=False)
            found = [line for line in out.stdout.splitlines() if line.startswith("RESULT ")]
            if not found:
                raise SystemExit(f"{contender} failed:\n{out.stderr[-3000:]}")
            runs.append(json.loads(found[0].removeprefix("RESULT ")))
    units = [line[unit] for line in results["ours"][0]["lines"]]
    print(f"\n{kind}: {options.steps} steps, {sum(units):,.0f} {unit}, {options.rounds} rounds")
    print("  step   loss ours    loss TRL   norm ours    norm TRL")
    for number, (a, b) in enumerate(zip(results["ours"][0]["lines"], results["trl"][0]["lines"], strict=True), 1):
        print(f"  {number:4d}  {a['loss']:10.4f}  {b['loss']:10.4f}  {a['grad_norm']:10.4f}  {b['grad_norm']:10.4f}")
    speed: dict[str, float] = {}
    peak: dict[str, float] = {}
    for contender, runs in results.items():
        rates = [units[n] / run["lines"][n]["seconds"] for run in runs for n in range(WARM_UP, options.steps)]
        speed[contender], peak[contender] = statistics.median(rates), min(run["peak_gib"] for run in runs)
        rate = f"{speed[contender]:8.2f} {unit}/s (median of steps)"
        print(f"  {contender:5s} {rate}   peak memory {peak[contender]:.2f} GiB")
    return speed["ours"] / speed["trl"], peak["ours"] / peak["trl"]
