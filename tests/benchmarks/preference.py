"""DPO steps of ftlaunch against TRL's DPOTrainer: same model, adapter, pairs, batches, dtype and threads.

    python tests/benchmarks/preference.py --model .cache/SmolLM2-135M-Instruct --data ../shared/data

As tests/benchmarks/sft.py, over GSM8K pairs as they are ("gsm8k") and with prompts about three times as long as their
answers ("long"). Both go on training an adapter and ask a frozen copy of it at each step. TRL is given bf16 weights and
no activation checkpointing. The last line is the worst ratio of pairs a second, ours over theirs.
"""

import json
import tempfile
from pathlib import Path

import duel

KINDS = ["gsm8k", "long"]
BATCH = 4
LEARNING_RATE = 1e-4  # at 1e-5 the first steps would be lost in bf16 rounding, and parity with them
MAX_LENGTH = 1024


def pairs_of(kind: str, data: Path, count: int) -> list[dict[str, str]]:
    """`count` pairs; the long ones have the questions and right answers of two others in front of their prompt."""
    with (data / "gsm8k_pairs.jsonl").open() as file:
        pairs = [json.loads(line) for line in file][: count + 2]
    if kind == "gsm8k":
        return pairs[:count]
    shots = [f"{pair['prompt']}\n{pair['chosen']}" for pair in pairs]
    return [
        {**pair, "prompt": "\n\n".join([*shots[place + 1 : place + 3], pair["prompt"]])}
        for place, pair in enumerate(pairs[:count])
    ]


def ours(model: str, adapter: Path, rows: list[dict[str, str]], steps: int, dtype: str) -> duel.Lines:
    """The DPO stage's own parts, fed with the pairs in order."""
    import torch

    from ftlaunch.recipe.data import Data
    from ftlaunch.recipe.stages import Dpo
    from fttrain.adapters import add_frozen, attach
    from fttrain.data.batches import MicroBatch, split_batch
    from fttrain.data.tokens import tokenize
    from fttrain.distributed import world
    from fttrain.engine import Engine
    from fttrain.model.scorer import DTYPES, Scorer, load_base, load_tokenizer
    from fttrain.preference import reference
    from fttrain.preference.objective import Compared, Comparison, answer_logps
    from fttrain.stages import dpo
    from fttrain.training import optim

    stage = Dpo(data="pairs", batch_size=BATCH)
    step = duel.bench_step(stage, model, micro_batch_size=BATCH, dtype=dtype)
    me = world.start(step)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = Data(path=str(path), format="preference", max_length=MAX_LENGTH)
        table = tokenize(data, load_tokenizer(model), 0, Path(folder)).train
    engine = Engine(step, me)
    base = load_base(step.model, dtype=DTYPES[dtype], packing=True)
    policy = attach(base, step.adapter, adapter, in_fp32=True)
    add_frozen(policy, adapter, reference.REFERENCE, in_fp32=True)
    scorer = Scorer(policy)
    engine.prepare(scorer.train(), optim.build(step.optimizer, scorer.named_parameters()))
    engine.set_learning_rate(LEARNING_RATE)

    def compare(engine: Engine, micro: MicroBatch) -> Compared:
        reference_G2 = reference.live(engine, micro)
        logps_G2, lengths_G2 = answer_logps(engine.scores(micro).smoothed_N, micro)
        ratios_G2 = logps_G2 - reference_G2
        return Compared(dpo.loss(stage, ratios_G2, lengths_G2), ratios_G2.detach())

    def micros_of(number: int) -> list[MicroBatch]:
        batch = [table.group(number * BATCH + index) for index in range(BATCH)]
        layout = {"rank": 0, "world_size": 1, "accumulation": 1, "device": torch.device("cpu")}
        return split_batch(batch, packing=True, share=True, **layout)

    return duel.take_steps(engine, Comparison(compare), micros_of, steps, "pairs")


def theirs(model: str, adapter: Path, rows: list[dict[str, str]], steps: int, dtype: str) -> duel.Lines:
    """TRL's DPOTrainer over the same pairs in the same order."""
    from trl import DPOConfig, DPOTrainer

    turn = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    chat = [{key: [{"role": role, "content": row[key]}] for key, role in turn.items()} for row in rows]
    settings = {"per_device_train_batch_size": BATCH, "learning_rate": LEARNING_RATE, "max_length": MAX_LENGTH}
    return duel.take_steps_of_trl(DPOTrainer, DPOConfig, model, adapter, chat, steps, dtype, **settings)


def main() -> None:
    parser = duel.make_parser(__doc__, kinds=KINDS, steps=6)
    options = parser.parse_args()
    if not (options.data / "gsm8k_pairs.jsonl").exists():
        parser.error(f"--data: {options.data} does not hold gsm8k_pairs.jsonl (fields prompt, chosen, rejected)")
    contenders = {"ours": ours, "trl": theirs}
    duel.compete(__file__, options, contenders, pairs_of, kinds=KINDS, batch=BATCH, unit="pairs")


if __name__ == "__main__":
    main()
