"""Stages that learn from pairs are the same however they are shared out; chains end in a merged model."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.faults.ranks import Ranks, write_run

from ftlaunch.load import load_recipe
from ftlaunch.recipe.data import Data
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import RunDir, StageDir

RECIPE = """
name = "pairs"
seed = 7
model.path = "{model}"
model.dtype = "fp32"
adapter.kind = "{adapter}"
parallel.device = "cpu"
[data.pairs]
path = "{pairs}"
format = "preference"
test = 4
"""
ROWS = """
[data.rows]
path = "{rows}"
prompt = "{{question}}"
completion = "{{answer}}"
"""
STAGE = """
[[stage]]
kind = "{kind}"
data = "{data}"
steps = 4
batch_size = 8
learning_rate = {rate}
"""
MERGE = '[[stage]]\nkind = "merge"\n'
CHAINS = {
    "sft, dpo, merge": [STAGE.format(kind="sft", data="rows", rate=1e-2),
                        STAGE.format(kind="dpo", data="pairs", rate=1e-2), MERGE],
    "reward, merge": [STAGE.format(kind="reward", data="pairs", rate=1e-2), MERGE],
    "dpo in full": [STAGE.format(kind="dpo", data="pairs", rate=1e-4)],
    "orpo in full": [STAGE.format(kind="orpo", data="pairs", rate=1e-4)],
}  # fmt: skip
WAYS = {
    "ddp": ["parallel.strategy=ddp", "parallel.procs_per_node=2"],
    "zero2": ["parallel.strategy=zero2", "parallel.procs_per_node=2"],
    "zero3": ["parallel.strategy=zero3", "parallel.procs_per_node=2"],
}


@pytest.fixture
def run(tiny_model: Path, rows_file: Path, pairs: Data, tmp_path: Path, ranks: Ranks) -> Callable[..., RunDir]:
    def start(chain: str, *settings: str) -> RunDir:
        adapter = "full" if chain.endswith("full") else "lora"
        text = RECIPE.format(model=tiny_model, pairs=pairs.path, adapter=adapter)
        rows = ROWS.format(rows=rows_file) if "sft" in chain else ""
        (tmp_path / "pairs.toml").write_text("".join([text, rows, *CHAINS[chain]]))
        recipe = load_recipe(tmp_path / "pairs.toml", list(settings)).recipe
        written = write_run(recipe, tmp_path / f"run{len(list(tmp_path.glob('run*')))}")
        for stage_dir in written.stage_dirs():
            ranks.run(stage_dir)
        return written

    return start


def told(stage_dir: StageDir) -> list[tuple[int, str, float]]:
    """Every number that training or evaluation has to say, but those of a clock or of memory."""
    measured = {"time", "tokens_per_second", "peak_memory_bytes", "step"}
    lines = read_jsonl(stage_dir.metrics)
    return [(line["step"], key, value) for line in lines for key, value in line.items() if key not in measured]


@pytest.mark.parametrize(
    ("chain", "way"),
    [
        ("sft, dpo, merge", "ddp"),
        ("sft, dpo, merge", "zero3"),
        ("reward, merge", "zero3"),
        ("dpo in full", "zero2"),
        ("orpo in full", "ddp"),
    ],
)
def test_every_way_trains_the_same(chain: str, way: str, run: Callable[..., RunDir]) -> None:
    alone, shared = run(chain), run(chain, *WAYS[way])
    compared = 0
    for ours, theirs in zip(alone.stage_dirs(), shared.stage_dirs(), strict=True):
        assert ours.result.exists()
        assert theirs.result.exists()
        for (step, key, value), (_, _, other) in zip(told(ours), told(theirs), strict=True):
            if step == 1 and key == "rewards/accuracy":
                continue  # all rewards are 0, to the last bit or not
            assert other == pytest.approx(value, abs=2e-4), f"{ours.name}, step {step}: {key}"
            compared += 1
    assert compared >= 4 * 10
    last = shared.stage_dirs()[-1]
    if last.kind == "merge":
        ours, theirs = (
            load_file(next(step.model.glob("model*.safetensors"))) for step in (alone.stage_dirs()[-1], last)
        )
        assert all((theirs[name] - ours[name]).abs().mean() < 1e-5 for name in ours)
