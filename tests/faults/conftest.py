"""Trials by the hundred: a sample of each in the tests, all of them with `make faults`."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.trainer.conftest import RECIPE

from ftlaunch.load import load_recipe
from ftlaunch.recipe.recipe import Recipe


@pytest.fixture(scope="session")
def trials(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """How many trials to make: `trials(sample, full)`."""
    full = request.config.getoption("--all-trials")
    return lambda sample, number: number if full else sample


PAIRS = """
[data.pairs]
path = "pairs.jsonl"
format = "preference"
test = 8
"""
STAGES = {
    "sft": 'data = "rows"',
    "reward": 'data = "pairs"',
    "dpo": 'data = "pairs"',
    "orpo": 'data = "pairs"',
    "ppo": 'data = "rows"\nmax_new_tokens = 4\nreward_function = "reward.py:length"\nrollout_size = 16\nppo_epochs = 2',
}
"""What each kind of training stage is on the tiny data."""


@pytest.fixture(scope="session")
def load_path(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The tiny recipe as a file, with one stage of a kind; with dropout, where it is to be the same bits."""

    def write(kind: str = "sft", dropout: float = 0.0) -> Path:
        folder = tmp_path_factory.mktemp("recipe")
        rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
        pairs = [{"prompt": row["question"], "chosen": row["answer"], "rejected": "lamp"} for row in rows]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        (folder / "reward.py").write_text("def length(prompt, answer, row):\n    return len(answer) / 4\n")
        text = RECIPE.format(model=tiny_model, rows=rows_file, dropout=dropout)
        text = text.replace('kind = "sft"\ndata = "rows"', f'kind = "{kind}"\n{STAGES[kind]}')
        (folder / "tiny.toml").write_text(text + PAIRS if STAGES[kind] == 'data = "pairs"' else text)
        return folder / "tiny.toml"

    return write


@pytest.fixture(scope="session")
def load(load_path: Callable[..., Path]) -> Callable[..., Recipe]:
    """The tiny recipe with settings put in."""
    return lambda *settings, kind="sft", dropout=0.0: load_recipe(load_path(kind, dropout), settings).recipe


@pytest.fixture(scope="session")
def calls_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """calls.c as a library to be loaded before libc."""
    library = tmp_path_factory.mktemp("library") / "calls.so"
    source = Path(__file__).with_name("calls.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


@pytest.fixture
def count_calls(calls_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the next writing process does at which of its calls below a folder; it counts them in `count`."""

    def act(root: Path, at: int = 0, do: str = "") -> None:
        monkeypatch.setenv("LD_PRELOAD", str(calls_library))
        monkeypatch.setenv("FAULT_ROOT", str(root))
        monkeypatch.setenv("FAULT_COUNT", str(tmp_path / "count"))
        monkeypatch.setenv("FAULT_AT", str(at))
        monkeypatch.setenv("FAULT_DO", do)

    return act
