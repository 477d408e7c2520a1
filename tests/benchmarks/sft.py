"""SFT steps of ftlaunch against TRL's SFTTrainer: same model, adapter, rows, batches, dtype and threads.

    python tests/benchmarks/sft.py --model .cache/SmolLM2-135M-Instruct --data ../shared/data

Each contender is a process of its own, started in turn, ours first, `--rounds` times; the median step counts, after
two steps of warm-up. TRL is given its best setting for a CPU: bf16 weights, chunked loss, no activation checkpointing,
completion-only loss, padding to the longest row of a batch. Loss and gradient norm of every step stand beside them:
without parity a speed means nothing. The last line is the worst ratio of tokens a second, ours over theirs.
"""

import csv
import json
import random
import tempfile
import time
from pathlib import Path

import duel

BATCH = 8
LEARNING_RATE = 2e-4
MAX_LENGTH = 1024


def rows_of(kind: str, data: Path, count: int) -> list[dict[str, str]]:
    """Prompt and completion of `count` rows: E2E alone, or E2E and GSM8K in equal parts, shuffled once."""
    with (data / "e2e_dev.csv").open() as file:
        e2e = [{"prompt": row["mr"], "completion": row["ref"]} for row in csv.DictReader(file)]
    random.Random(0).shuffle(e2e)
    if kind == "e2e":
        return e2e[:count]
    with (data / "gsm8k_train.jsonl").open() as file:
        gsm = [json.loads(line) for line in file]
    pairs = [{"prompt": row["question"], "completion": row["answer"]} for row in gsm[: count // 2]]
    mixed = e2e[: count - len(pairs)] + pairs
    random.Random(1).shuffle(mixed)
    return mixed


def ours(model: str, adapter: Path, rows: list[dict[str, str]], steps: int) -> list[dict[str, float]]:
    """The trainer's own engine, layout and objective, fed with the rows in order."""
    import torch

    from ftlaunch.adapter import Lora
    from ftlaunch.recipe import Data, Model, Optimizer, Parallel, Sft
    from ftlaunch.rundir import Step
    from fttrain import optim, world
    from fttrain.adapters import attach
    from fttrain.data.batches import lay_out
    from fttrain.data.chat import Encoder
    from fttrain.data.token_set import token_set
    from fttrain.engine import Engine
    from fttrain.loop import _take
    from fttrain.model import DTYPES, Scorer, load_base, load_tokenizer
    from fttrain.stages.sft import CrossEntropy

    step = Step(
        name="bench",
        stage=Sft(data="rows", batch_size=BATCH),
        model=Model(path=model),
        adapter=Lora(),
        optimizer=Optimizer(),
        parallel=Parallel(device="cpu"),
        data={},
        seed=0,
        deterministic=False,
        world_size=1,
        micro_batch_size=BATCH,
        training_hash="",
    )
    me = world.start(step)
    data = Data(path="rows", prompt="{prompt}", completion="{completion}", max_length=MAX_LENGTH)
    encoder = Encoder(load_tokenizer(model), data)
    table = token_set([row for row in encoder.encode_many([("row", row) for row in rows]) if row is not None])
    engine = Engine(step, me)
    base = load_base(step.model, dtype=DTYPES["bf16"], packing=True)
    scorer = Scorer(attach(base, step.adapter, adapter, in_fp32=True))
    engine.prepare(scorer.train(), optim.build(step.optimizer, scorer.model.named_parameters()))
    engine.set_learning_rate(LEARNING_RATE)
    objective, lines = CrossEntropy(), []
    for number in range(steps):
        started = time.perf_counter()
        batch = [table.group(number * BATCH + index) for index in range(BATCH)]
        micros = lay_out(batch, rank=0, world_size=1, accumulation=1, packing=True, device=torch.device("cpu"))
        weight = sum(map(objective.weight, micros))
        outcome = _take(objective, engine, micros, weight)
        seconds = time.perf_counter() - started
        lines.append(
            {
                "loss": outcome.loss,
                "grad_norm": outcome.grad_norm,
                "seconds": seconds,
                "tokens": sum(m.tokens for m in micros),
            }
        )
    return lines


def theirs(model: str, adapter: Path, rows: list[dict[str, str]], steps: int) -> list[dict[str, float]]:
    """TRL's SFTTrainer over the same rows in the same order."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Sequential(SFTTrainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.lines: list[dict[str, float]] = []

        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds = time.perf_counter() - self.started

        def on_log(self, _args, _state, _control, logs, **__):
            if "loss" in logs:
                line = {"loss": logs["loss"], "grad_norm": logs["grad_norm"], "seconds": self.seconds}
                self.lines.append(line)

    torch.set_num_threads(torch.get_num_threads())
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    chat = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows
    ]
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            output_dir=out,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_length=MAX_LENGTH,
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        clock = Clock()
        trainer = Sequential(
            model=PeftModel.from_pretrained(base, str(adapter), is_trainable=True),
            args=config,
            train_dataset=Dataset.from_list(chat),
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[clock],
        )
        trainer.train()
    return clock.lines


def main() -> None:
    parser = duel.make_parser(__doc__, kinds=["e2e", "mixed"], steps=8)
    options = parser.parse_args()
    if not (options.data / "e2e_dev.csv").exists():
        parser.error(f"--data: {options.data} does not hold e2e_dev.csv (columns mr, ref) and gsm8k_train.jsonl")
    if options.contender:
        rows = rows_of(options.kind, options.data, BATCH * options.steps)
        run = {"ours": ours, "trl": theirs}[options.contender]
        duel.tell(run(options.model, options.adapter, rows, options.steps))
        return
    kinds = [options.kind] if options.kind else ["e2e", "mixed"]
    duel.fight(Path(__file__), options, kinds, unit="tokens")


if __name__ == "__main__":
    main()
