"""SFT steps of ftlaunch against TRL's SFTTrainer: same model, adapter, rows, batches, dtype and threads.

    python tests/benchmarks/sft.py --model .cache/SmolLM2-135M-Instruct --data ../shared/data

Each contender is a process of its own, started in turn, ours first, `--rounds` times; the median step counts, after
two steps of warm-up. TRL is given its best setting for a CPU: weights in the same format, chunked loss, no activation
checkpointing, completion-only loss, padding to the longest row of a batch. Loss and gradient norm of every step stand
next to them: without parity a speed means nothing. The last line is the worst ratio of tokens per second to TRL's.
"""

import csv
import json
import random
from pathlib import Path

import duel

KINDS = ["e2e", "mixed"]
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


def ours(model: str, adapter: Path, rows: list[dict[str, str]], steps: int, dtype: str) -> duel.Lines:
    """The trainer's own engine, layout and objective, fed with the rows in order."""
    import torch

    from ftlaunch.recipe.data import Data
    from ftlaunch.recipe.stages import Sft
    from fttrain.adapters import attach
    from fttrain.data.batches import MicroBatch, split_batch
    from fttrain.data.chat import Encoder
    from fttrain.data.token_set import token_set
    from fttrain.distributed import world
    from fttrain.engine import Engine
    from fttrain.model.scorer import DTYPES, Scorer, load_base, load_tokenizer
    from fttrain.stages.sft import CrossEntropy
    from fttrain.training import optim

    step = duel.bench_step(Sft(data="rows", batch_size=BATCH), model, micro_batch_size=BATCH, dtype=dtype)
    me = world.start(step)
    data = Data(path="rows", prompt="{prompt}", completion="{completion}", max_length=MAX_LENGTH)
    encoder = Encoder(load_tokenizer(model), data)
    table = token_set([one for made in encoder.encode_many([("row", row) for row in rows]) for one in made])
    engine = Engine(step, me)
    base = load_base(step.model, dtype=DTYPES[dtype], packing=True)
    scorer = Scorer(attach(base, step.adapter, adapter, in_fp32=True))
    engine.prepare(scorer.train(), optim.build(step.optimizer, scorer.model.named_parameters()))
    engine.set_learning_rate(LEARNING_RATE)

    def micros_of(number: int) -> list[MicroBatch]:
        batch = [table.group(number * BATCH + index) for index in range(BATCH)]
        return split_batch(batch, rank=0, world_size=1, accumulation=1, packing=True, device=torch.device("cpu"))

    return duel.take_steps(engine, CrossEntropy(), micros_of, steps, "tokens")


def theirs(model: str, adapter: Path, rows: list[dict[str, str]], steps: int, dtype: str) -> duel.Lines:
    """TRL's SFTTrainer over the same rows in the same order."""
    from trl import SFTConfig, SFTTrainer

    turn = {"prompt": "user", "completion": "assistant"}
    chat = [{key: [{"role": role, "content": row[key]}] for key, role in turn.items()} for row in rows]
    settings = {"per_device_train_batch_size": BATCH, "learning_rate": LEARNING_RATE, "max_length": MAX_LENGTH}
    return duel.take_steps_of_trl(SFTTrainer, SFTConfig, model, adapter, chat, steps, dtype, **settings)


def main() -> None:
    parser = duel.make_parser(__doc__, kinds=KINDS, steps=8)
    options = parser.parse_args()
    if not (options.data / "e2e_dev.csv").exists():
        parser.error(f"--data: {options.data} does not hold e2e_dev.csv (columns mr, ref) and gsm8k_train.jsonl")
    contenders = {"ours": ours, "trl": theirs}
    duel.compete(__file__, options, contenders, rows_of, kinds=KINDS, batch=BATCH, unit="tokens")


if __name__ == "__main__":
    main()
