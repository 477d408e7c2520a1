"""Adapters trained through rounded weights against the same adapters rounded afterwards: same rows, steps and seed."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.in_process import make_step, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftlaunch.recipe.adapter import Full, Lora
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.model import BitLinear, Qat
from ftlaunch.recipe.stages import Merge
from fttrain.evaluation import perplexity
from fttrain.merging.merge import find_source, merge
from fttrain.quant import qat

pytestmark = pytest.mark.slow
WORDS = ["red", "green", "blue", "salt", "pepper", "kettle", "lamp"]
ADAPTER = Lora(rank=16, alpha=32)
STEPS = {"steps": 60, "batch_size": 8, "save_every": 1000, "learning_rate": 5e-3}


def write(path: Path, count: int, seed: int) -> Path:
    """Lines of words, each of which is followed by the next of the list more often than not."""
    draw = random.Random(seed)

    def line() -> str:
        at, told = draw.randrange(7), []
        for _ in range(12):
            told.append(WORDS[at])
            at = (at + 1) % 7 if draw.random() < 0.8 else draw.randrange(7)
        return " ".join(told)

    path.write_text("".join(json.dumps({"text": line()}) + "\n" for _ in range(count)))
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Data:
    path = write(tmp_path_factory.mktemp("data") / "rows.jsonl", 320, seed=0)
    return Data(path=str(path), format="text", train_on="all")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows: Data) -> Path:
    """The tiny model, trained in full until it can spell."""
    folder = tmp_path_factory.mktemp("base")
    return train(make_step(tiny_model, rows, adapter=Full(), **{**STEPS, "steps": 200}), folder).artifact


@pytest.fixture(scope="module")
def rounded_afterwards(tmp_path_factory: pytest.TempPathFactory, base: Path, rows: Data) -> Path:
    """The base with a plain adapter, merged; what its twins are rounded from."""
    return adapted(base, rows, tmp_path_factory.mktemp("plain"), "none")


def adapted(base: Path, rows: Data, folder: Path, quantization: Any) -> Path:
    spec = make_step(base, rows, adapter=ADAPTER, model_fields={"quantization": quantization}, **STEPS)
    step = train(spec, folder)
    merge(find_source(step.artifact), folder / "merged", Merge())
    return folder / "merged"


@pytest.mark.parametrize(
    "spec", [Qat(bits=2), Qat(bits=2, learned_step=True), BitLinear()], ids=["qat", "learned", "bitlinear"]
)
def test_training_through_rounding_beats_rounding_afterwards(
    spec: Any, base: Path, rounded_afterwards: Path, rows: Data, tmp_path: Path
):
    trained = adapted(base, rows, tmp_path, spec)
    windows = perplexity.windows(
        AutoTokenizer.from_pretrained(base), write(tmp_path / "held-out.jsonl", 40, seed=1), length=64, count=20
    )
    ours, plain = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (trained, rounded_afterwards))
    qat.follow_card(ours, trained)
    in_full = perplexity.perplexity(plain, windows)
    qat.install(plain, spec)
    through, afterwards = perplexity.perplexity(ours, windows), perplexity.perplexity(plain, windows)
    print(f"\n{spec}: in full {in_full:.3f}, trained through {through:.3f}, rounded afterwards {afterwards:.3f}")
    assert in_full < through < afterwards
