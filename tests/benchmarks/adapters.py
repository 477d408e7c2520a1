"""Steps of one kind of adapter against another: DoRA against LoRA and PEFT's own DoRA, the top 8 layers against all.

    python tests/benchmarks/adapters.py --model .cache/SmolLM2-135M-Instruct --data ../shared/data

All contenders stand in one process and take the same batches in turn, a step each, so that whatever else the machine
does meets all of them; medians are over the steps after two of warm-up. Loss and gradient norm are printed: DoRA and
PEFT's DoRA must agree, and all losses begin as the base's own. PEFT's DoRA learns nothing else than ours; it makes the
product B·A and its norm at every step. The last lines are ratios: how many times faster than ours the other is.
"""

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import duel
from sft import BATCH, LEARNING_RATE, MAX_LENGTH, rows_of

WARM_UP = 2
CONTENDERS = ("LoRA", "DoRA", "PEFT's DoRA", "top 8", "LoRA, checkpointed", "top 8, checkpointed")


def plan(name: str, model: str, dtype: str) -> Any:
    """What a contender's process would be told."""
    from ftlaunch.recipe.adapter import Dora, Lora
    from ftlaunch.recipe.stages import Sft

    adapter = Dora() if "DoRA" in name else Lora(layers="top:8" if "top 8" in name else None)
    return duel.bench_step(Sft(data="rows", batch_size=BATCH), model, adapter, micro_batch_size=BATCH, dtype=dtype)


def make(name: str, step: Any, me: Any) -> Any:
    """An engine with the contender in it."""
    import torch

    from fttrain import adapters
    from fttrain.adapters import low_rank
    from fttrain.engine import Engine
    from fttrain.model.scorer import DTYPES, Scorer, load_base
    from fttrain.training import optim, session

    torch.manual_seed(0)
    engine = Engine(step, me)
    base: Any = load_base(step.model, dtype=DTYPES[step.model.dtype], packing=True)

    class AsInPeft(low_rank.Method[Any]):
        options: ClassVar[dict[str, Any]] = {"use_dora": "DoRA" in name}

    if name.startswith("PEFT"):
        wrapped = AsInPeft(step.adapter, adapters.TRAINED).attach(base.requires_grad_(False), None, in_fp32=True)
    else:
        wrapped = adapters.attach(base, step.adapter, None, in_fp32=True)
    if "checkpointed" in name:
        session.checkpoint_activations(base)
    scorer = Scorer(wrapped)
    engine.prepare(scorer.train(), optim.build(step.optimizer, scorer.named_parameters()))
    engine.set_learning_rate(LEARNING_RATE)
    return engine


def batches(model: str, data: Path, steps: int) -> Iterator[Any]:
    """Micro-batches of a step each, packed."""
    import torch

    from ftlaunch.recipe.data import Data
    from fttrain.data.batches import split_batch
    from fttrain.data.chat import Encoder
    from fttrain.data.token_set import token_set
    from fttrain.model.scorer import load_tokenizer

    spec = Data(path="rows", prompt="{prompt}", completion="{completion}", max_length=MAX_LENGTH)
    rows = rows_of("e2e", data, BATCH * steps)
    encoder = Encoder(load_tokenizer(model), spec)
    table = token_set([one for made in encoder.encode_many([("row", row) for row in rows]) for one in made])
    for number in range(steps):
        groups = [table.group(number * BATCH + index) for index in range(BATCH)]
        yield split_batch(groups, rank=0, world_size=1, accumulation=1, packing=True, device=torch.device("cpu"))


def race(model: str, data: Path, steps: int, dtype: str) -> dict[str, list[float]]:
    """Seconds of every step of each contender; prints losses and norms."""
    from fttrain.distributed import world
    from fttrain.stages.sft import CrossEntropy
    from fttrain.training.loop import _take

    steps_of = {name: plan(name, model, dtype) for name in CONTENDERS}
    me = world.start(steps_of[CONTENDERS[0]])
    engines = {name: make(name, step, me) for name, step in steps_of.items()}
    objective, seconds = CrossEntropy(), {name: [] for name in CONTENDERS}
    print(f"{steps} steps of {BATCH} rows; loss and gradient norm\n  step" + "".join(f"{n:>22s}" for n in CONTENDERS))
    for number, micros in enumerate(batches(model, data, steps), 1):
        told = {}
        for name in random.Random(number).sample(CONTENDERS, len(CONTENDERS)):
            started = time.perf_counter()
            outcome = _take(objective, engines[name], micros, sum(map(objective.weight, micros)))
            seconds[name].append(time.perf_counter() - started)
            told[name] = f"{outcome.loss:.4f}  {outcome.grad_norm:.4f}"
        print(f"  {number:4d}" + "".join(f"{told[name]:>22s}" for name in CONTENDERS), flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    duel.add_dtype(parser)
    options = parser.parse_args()
    seconds = race(options.model, options.data, options.steps, duel.dtype_of(options))
    median = {name: statistics.median(found[WARM_UP:]) for name, found in seconds.items()}
    for name, value in median.items():
        print(f"  {name:22s} {value:.3f} s a step")
    for ours, other in (
        ("DoRA", "LoRA"),
        ("PEFT's DoRA", "LoRA"),
        ("top 8", "LoRA"),
        ("top 8, checkpointed", "LoRA, checkpointed"),
    ):
        print(f"{ours} against {other}: ratio {median[other] / median[ours]:.2f}")


if __name__ == "__main__":
    main()
