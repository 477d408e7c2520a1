"""A recipe on the tiny model, and what a run of it left."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlaunch.recipe.data import Data
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir
from fttrain.distributed import precision

RECIPE = """
name = "tiny"
seed = 7
[model]
path = "{model}"
dtype = "fp32"
[adapter]
kind = "lora"
rank = 4
alpha = 8
dropout = {dropout}
[data.rows]
path = "{rows}"
prompt = "{{question}}"
completion = "{{answer}}"
test = 8
[[stage]]
kind = "sft"
data = "rows"
steps = 6
batch_size = 8
learning_rate = 1e-2
save_every = 2
[parallel]
device = "cpu"
"""


@pytest.fixture(autouse=True)
def open_formats_are_fp32(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test leaves the number format open, this process computes in fp32, as it does on a CPU without bf16.

    Numbers are compared more closely than bf16 allows. The tests of that choice see the CPU as it is.
    """
    if request.path.name != "test_precision.py":
        monkeypatch.setattr(precision, "_bf16_instructions", lambda: None)


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, rows_file: Path) -> Callable[..., Path]:
    """Writes the recipe; dropout is the one thing that a test of equality wants to choose."""

    def write(*, dropout: float = 0.0) -> Path:
        path = tmp_path / "tiny.toml"
        path.write_text(RECIPE.format(model=tiny_model, rows=rows_file, dropout=dropout))
        return path

    return write


def make_pairs() -> list[dict[str, str]]:
    """24 pairs of very different lengths, whose better answers speak of salt and whose worse ones of rain."""
    draw = random.Random(1)
    words = ["red", "green", "kettle", "lamp", "blue"]

    def text(word: str) -> str:
        return " ".join([*draw.choices([*words, word], k=draw.randint(1, 7)), word])

    return [{"prompt": text("ask"), "chosen": text("salt"), "rejected": text("rain")} for _ in range(24)]


@pytest.fixture(scope="session")
def pair_rows() -> list[dict[str, str]]:
    return make_pairs()


@pytest.fixture
def pairs(pair_rows: list[dict[str, str]], tmp_path: Path) -> Data:
    """These pairs as a data table."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pair_rows))
    return Data(path=str(path), format="preference")


@pytest.fixture
def losses() -> Callable[[StageDir], list[tuple[float, float]]]:
    """(loss, grad_norm) of every optimizer step, checked to be each step once."""

    def read(step: StageDir) -> list[tuple[float, float]]:
        lines = [line for line in read_jsonl(step.metrics) if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [(line["loss"], line["grad_norm"]) for line in lines]

    return read


@pytest.fixture
def adapter() -> Callable[[StageDir], dict]:
    """The tensors of a step's artifact."""
    from safetensors.torch import load_file

    def read(step: StageDir) -> dict:
        tensors = load_file(step.artifact / "adapter_model.safetensors")
        assert tensors
        assert all(tensor.numel() for tensor in tensors.values())
        assert json.loads((step.artifact / "artifact.json").read_text())["adapter"]["kind"] == "lora"
        return tensors

    return read
