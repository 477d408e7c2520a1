"""`python -m tests.zoo.peers --kept FILE [FAMILY …]`: TRL's SFT next to ours, for a family of each mechanism.

What is found is kept in FILE, one line per family; once no family is left, recipes/PEERS.md is written.

Both get the same four rows and tiny models, in fp32 on a CPU. Right is a first loss and a gradient norm that are those
of the model's own `forward`, row by row. TRL packs with its default strategy and attention: on a CPU it has no other.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tests.trainer.in_process import make_data, make_step, train
from tests.zoo import faith
from tests.zoo.families import build
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ftlaunch.errors import UserError
from fttrain.data.token_set import Group

PAGE = Path(__file__).parents[2] / "recipes" / "PEERS.md"
LOSS = 1e-4
"""Nats per token, relative where the loss is above 1: Trainer logs losses with few digits."""
RIGHT, WRONG, REFUSED, FAILED = "right", "wrong", "refused", "error"
TRIED = [
    *("llama", "mistral, window", "qwen2, window", "qwen3", "gemma2", "gemma3", "gemma3, with vision", "phi3", "gpt2"),
    *("gpt_neo", "gptj", "bloom", "falcon, alibi", "opt", "mpt", "stablelm", "cohere2", "olmo3", "granite", "gpt_oss"),
    *("mixtral", "qwen3_moe", "deepseek_v3", "deepseek_v32", "llama4", "doge", "hyperclovax", "modernbert-decoder"),
    *("qwen3_next", "qwen3_5", "jamba", "bamba", "falcon_h1", "mamba2", "lfm2", "recurrent_gemma", "rwkv", "minimax"),
    *("zamba2", "kimi_linear"),
]
HEADER = """# Models, next to TRL

Made by `python -m tests.zoo.peers` with TRL {trl} and transformers {transformers}; do not edit. Tiny random models of
each family train on the same four rows, in fp32 on a CPU, with default settings but for TRL's loss that balances
experts, which is off.

- **right**: the first loss and the gradient's norm are those of plain transformers, row by row (to 1e-4 and 1e-3)
- **wrong**: it trains on other numbers, without an error
- **refused**: an error by name before the first step, **error**: any other, with a traceback

| | {columns} |
| --- | {rules} |
{counts}

| family | {columns} | ftlaunch lays rows |
| --- | {rules} | --- |
"""
COLUMNS = ("TRL packed", "TRL padded", "ftlaunch")


def _theirs(model: Path, expected: faith.Measured, *, packing: bool) -> str:
    rows = [
        {"input_ids": ids.tolist(), "completion_mask": trained.astype(int).tolist()} for ids, trained in faith.rows()
    ]
    with tempfile.TemporaryDirectory() as out:
        settings = SFTConfig(
            output_dir=out,
            max_steps=1,
            learning_rate=0.0,
            per_device_train_batch_size=len(rows),
            max_length=512,
            packing=packing,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            router_aux_loss_coef=0.0,  # TRL adds a loss that balances experts; plain transformers does not
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        trainer.train()
    first: dict[str, Any] = trainer.state.log_history[0]
    tokens = expected.logps_N.numel()
    loss, norm = -float(expected.logps_N.mean()), expected.grad_norm / tokens
    is_near = abs(first["loss"] - loss) <= LOSS * max(1.0, loss)
    return RIGHT if is_near and abs(first["grad_norm"] - norm) <= faith.NORM * norm else WRONG


def _ours(model: Path, expected: faith.Measured, folder: Path) -> tuple[str, str]:
    """What a stage's training is, and how its probe has laid the rows."""
    rows = folder / "rows.jsonl"
    rows.write_text('{"question": "what is red", "answer": "a lamp and a kettle"}\n' * 4)
    done = train(make_step(model, make_data(rows), steps=1, batch_size=4), folder)
    layout = json.loads(done.result.read_text())["probe"]["layout"]
    groups = [Group((row,)) for row in faith.rows()]
    found = faith.trained(model, groups, packing=layout == "packed", alone=layout == "alone")
    return RIGHT if found.is_same(expected) else WRONG, layout


def _said(trial: Callable[[], Any], otherwise: Any = FAILED) -> Any:
    """What the trial returns; REFUSED or FAILED where it raises."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trial()
    except UserError as error:
        print(f"  {error.message}", file=sys.stderr)
        return (REFUSED, "–")
    except Exception as error:  # noqa: BLE001 any failure of the other trainer is a result
        print(f"  {type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}", file=sys.stderr)
        return otherwise


def compared(name: str) -> list[str]:
    """The family's cells."""
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        model = build(name, Path(folder) / "model")
        expected = faith.plain(model, faith.rows())
        packed, padded = (
            _said(lambda packing=packing: _theirs(model, expected, packing=packing)) for packing in (True, False)
        )
        ours, layout = _said(lambda: _ours(model, expected, Path(folder)), (FAILED, "–"))
    return [packed, padded, ours, layout]


def page(found: dict[str, list[str]]) -> str:
    """The page, from the cells of each family."""
    counts = []
    for verdict in (RIGHT, WRONG, REFUSED, FAILED):
        numbers = [sum(cells[column] == verdict for cells in found.values()) for column in range(len(COLUMNS))]
        counts.append(f"| {verdict} | {' | '.join(map(str, numbers))} |")
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers")}
    header = HEADER.format(
        columns=" | ".join(COLUMNS), rules=" | ".join(["---"] * len(COLUMNS)), counts="\n".join(counts), **versions
    )
    return header + "".join(f"| {' | '.join([name, *cells])} |\n" for name, cells in found.items())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", default=TRIED)
    parser.add_argument("--kept", type=Path, required=True)
    options = parser.parse_args()
    kept: dict[str, list[str]] = dict(
        map(json.loads, options.kept.read_text().splitlines() if options.kept.exists() else ())
    )
    for name in options.families:
        if name not in kept:
            kept[name] = compared(name)
            with options.kept.open("a") as file:
                file.write(json.dumps([name, kept[name]]) + "\n")
    if set(TRIED) <= set(kept):
        PAGE.write_text(page({name: kept[name] for name in TRIED}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
