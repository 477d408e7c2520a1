"""LoRA trained through rounded weights against its twin that is merged, then rounded: perplexity of held-out rows.

    PYTHONPATH=. python tests/benchmarks/twins.py --model .cache/SmolLM2-135M-Instruct --data ../shared/data

E2E rows as plain text; every run has the same rows, steps and seed. What is measured is the merged model.
"""

import argparse
import csv
import json
import tempfile
from pathlib import Path
from typing import Any

BATCH = 4
HELD_OUT = 60
RANK = 16
LEARNING_RATE = 1e-3


def write_rows(data: Path, folder: Path, count: int) -> tuple[Path, Path]:
    """So many rows to train on, and those held out, which follow them in the file."""
    with (data / "e2e_dev.csv").open() as file:
        texts = [f"{row['mr']}\n{row['ref']}" for row in csv.DictReader(file)]
    train, held_out = folder / "train.jsonl", folder / "held-out.jsonl"
    for path, chosen in ((train, texts[:count]), (held_out, texts[-HELD_OUT:])):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
    return train, held_out


def adapted(model: Path, rows: Path, steps: int, quantization: Any, folder: Path) -> Path:
    """The folder of the model with an adapter trained under `quantization`, merged."""
    from tests.trainer.in_process import make_step, train

    from ftlaunch.recipe.adapter import Lora
    from ftlaunch.recipe.data import Data
    from ftlaunch.recipe.stages import Merge
    from fttrain.merging.merge import find_source, merge

    step = make_step(
        model,
        Data(path=str(rows), format="text", train_on="all", max_length=256),
        adapter=Lora(rank=RANK, alpha=2 * RANK),
        model_fields={"quantization": quantization},
        **{"steps": steps, "batch_size": BATCH, "save_every": steps, "learning_rate": LEARNING_RATE},
    )
    artifact = train(step, folder).artifact
    merge(find_source(artifact), folder / "merged", Merge(dtype="fp32"))
    return folder / "merged"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftlaunch.recipe.model import BitLinear, Qat
    from fttrain.evaluation import perplexity as texts
    from fttrain.quant import qat

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()

    with tempfile.TemporaryDirectory(prefix="ftlaunch-twins-") as place:
        folder = Path(place)
        rows, held_out = write_rows(options.data, folder, BATCH * options.steps)
        windows = texts.windows(AutoTokenizer.from_pretrained(options.model), held_out, length=256, count=20)
        plain = adapted(options.model, rows, options.steps, "none", folder / "plain")
        print(f"the base: perplexity {texts.perplexity(load(options.model), windows):.4g}")
        print(f"LoRA, {options.steps} steps: {texts.perplexity(load(plain), windows):.4g}", flush=True)
        for name, spec in (
            ("QAT in 4 bits", Qat()),
            ("QAT in 3 bits, groups of 64", Qat(bits=3, granularity="group")),
            ("BitNet b1.58", BitLinear()),
        ):
            through = load(merged := adapted(options.model, rows, options.steps, spec, folder / name))
            qat.follow_card(through, merged)
            qat.install(afterwards := load(plain), spec)
            told = [texts.perplexity(one, windows) for one in (through, afterwards)]
            print(f"{name}: trained through {told[0]:.4g}, rounded afterwards {told[1]:.4g}", flush=True)


if __name__ == "__main__":
    main()
