"""DPO steps of ftlaunch against TRL's DPOTrainer: same model, adapter, pairs, batches, dtype and threads.

    python tests/benchmarks/preference.py --model .cache/SmolLM2-135M-Instruct --data ../shared/data

As tests/benchmarks/sft.py, over GSM8K pairs as they are ("gsm8k") and with prompts about three times as long as their
answers ("long"). Both go on training an adapter and ask a frozen copy of it at each step. TRL is given bf16 weights and
no activation checkpointing. The last line is the worst ratio of pairs a second, ours over theirs.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import duel

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


def ours(model: str, adapter: Path, rows: list[dict[str, str]], steps: int) -> duel.Lines:
    """The DPO stage's own parts, fed with the pairs in order."""
    import torch

    from ftlaunch.adapter import Lora
    from ftlaunch.recipe import Data, Dpo, Model, Optimizer, Parallel
    from ftlaunch.rundir import Step
    from fttrain import optim, references, world
    from fttrain.adapters import add_frozen, attach
    from fttrain.comparison import Compared, Comparison, answer_logps
    from fttrain.data.batches import Micro, lay_out
    from fttrain.data.tokens import tokenize
    from fttrain.engine import Engine
    from fttrain.loop import _take
    from fttrain.model import DTYPES, Scorer, load_base, load_tokenizer
    from fttrain.stages import dpo

    stage = Dpo(data="pairs", batch_size=BATCH)
    step = Step(
        name="bench",
        stage=stage,
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
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = Data(path=str(path), format="preference", max_length=MAX_LENGTH)
        table = tokenize(data, load_tokenizer(model), 0, Path(folder)).train
    engine = Engine(step, me)
    base = load_base(step.model, dtype=DTYPES["bf16"], packing=True)
    policy = attach(base, step.adapter, adapter, in_fp32=True)
    add_frozen(policy, adapter, references.REFERENCE, in_fp32=True)
    scorer = Scorer(policy)
    engine.prepare(scorer.train(), optim.build(step.optimizer, scorer.named_parameters()))
    engine.set_learning_rate(LEARNING_RATE)

    def compare(engine: Engine, micro: Micro) -> Compared:
        reference_G2 = references.live(engine, micro)
        logps_G2, lengths_G2 = answer_logps(engine.scores(micro).smoothed_N, micro)
        ratios_G2 = logps_G2 - reference_G2
        return Compared(dpo.loss(stage, ratios_G2, lengths_G2), ratios_G2.detach())

    objective, lines = Comparison(compare), []
    for number in range(steps):
        started = time.perf_counter()
        batch = [table.group(number * BATCH + index) for index in range(BATCH)]
        micros = lay_out(
            batch, rank=0, world_size=1, accumulation=1, packing=True, share=True, device=torch.device("cpu")
        )
        outcome = _take(objective, engine, micros, float(BATCH))
        seconds = time.perf_counter() - started
        lines.append({"loss": outcome.loss, "grad_norm": outcome.grad_norm, "seconds": seconds, "pairs": BATCH})
    return lines


def theirs(model: str, adapter: Path, rows: list[dict[str, str]], steps: int) -> duel.Lines:
    """TRL's DPOTrainer over the same pairs in the same order."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Sequential(DPOTrainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.lines: duel.Lines = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.started

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                self.lines.append({"loss": logs["loss"], "grad_norm": logs["grad_norm"], "seconds": self.seconds})

    torch.set_num_threads(torch.get_num_threads())
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    turn = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    chat = [{key: [{"role": role, "content": row[key]}] for key, role in turn.items()} for row in rows]
    with tempfile.TemporaryDirectory() as out:
        clock = Clock()
        trainer = Sequential(
            model=PeftModel.from_pretrained(base, str(adapter), is_trainable=True),
            args=DPOConfig(
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
            ),
            train_dataset=Dataset.from_list(chat),
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[clock],
        )
        trainer.train()
    return clock.lines


def main() -> None:
    parser = duel.make_parser(__doc__, kinds=["gsm8k", "long"], steps=6)
    options = parser.parse_args()
    if not (options.data / "gsm8k_pairs.jsonl").exists():
        parser.error(f"--data: {options.data} does not hold gsm8k_pairs.jsonl (fields prompt, chosen, rejected)")
    if options.contender:
        rows = pairs_of(options.kind, options.data, BATCH * options.steps)
        run = {"ours": ours, "trl": theirs}[options.contender]
        duel.tell(run(options.model, options.adapter, rows, options.steps))
        return
    kinds = [options.kind] if options.kind else ["gsm8k", "long"]
    duel.fight(Path(__file__), options, kinds, unit="pairs")


if __name__ == "__main__":
    main()
