"""Shipped recipes on rows in the true shape of the data sets that they name, with a tiny model: looked over, shown, and
trained for two steps."""

import json
from pathlib import Path

import pytest
from tests.trainer.in_process import train

from ftlaunch.plan.plan import make_plan
from ftlaunch.rules import load_and_check
from ftlaunch.run.files import read_jsonl
from ftlaunch.tools import PreviewOptions
from fttrain.tools import preview

ROOT = Path(__file__).parents[3]
EVERY = [
    *("model.quantization=none", "model.dtype=fp32", "optimizer.name=adamw", "parallel.strategy=single"),
    *("parallel.device=cpu", "parallel.procs_per_node=1", "stage.sft.steps=2", "stage.sft.batch_size=4"),
    *("stage.sft.micro_batch_size=2", "stage.sft.evaluate_every=2", "stage.sft.save_every=2"),
]
"""What a recipe for large GPUs needs to be tried on a CPU, whatever it is."""
RIVERS = "Rivers are worth knowing: fact 0 says they vary with place and season. Ünïcödé 漢字 🙂."
RECIPES = {
    "noisy_gemma": ("dolly", "dolly.jsonl", f"{RIVERS}<|im_end|>\n", []),
    "dolly_oai": ("dolly", "dolly_oai.parquet", f"{RIVERS}<|im_end|>\n", []),
    "guanaco_llama2": (
        "guanaco",
        "guanaco_llama2.parquet",
        f"<s>[INST] What should I know about rivers, point 0? [/INST] {RIVERS} </s><|im_end|>",
        [],
    ),
    "english_quotes": (
        "quotes",
        "english_quotes.jsonl",
        f"Quote: “{RIVERS}”\nAuthor: Author 0<|im_end|>",
        ["adapter.targets=all-linear", "stage.sft.warmup=0"],
    ),
    "e2e_gpt2": ("e2e", "e2e_nlg.parquet", "The Rivers serves Thai, 0.<|im_end|>", ["adapter.layers=top:1"]),
    "llama3_dora": ("trivia", "trivia_qa.parquet", "York 0<|im_end|>\n", []),
}
"""Recipe → its data table, the file in that data set's shape, what the first row trains, and further settings."""


@pytest.mark.parametrize("name", RECIPES)
def test_it_trains_on_rows_as_they_are(
    name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, file, trained, further = RECIPES[name]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = f"data.{table}.path={ROOT / 'tests' / 'shapes' / file}"
    settings = [*EVERY, *further, f"model.path={tiny_model}", rows, f"data.{table}.test=4"]
    loaded = load_and_check(ROOT / "recipes" / f"{name}.toml", settings)
    plan = make_plan(loaded.recipe, tmp_path / "run")

    assert preview.main(PreviewOptions(recipe=loaded.recipe, rows=24, json=True)) == 0
    [shown] = json.loads(capsys.readouterr().out)
    texts = ["".join(piece["text"] for piece in sample if piece["trained"]) for sample in shown["samples"]]
    assert (shown["rows"], shown["kept"], len(texts)) == (24, 24, 24 - shown["held_out"])

    done = train(plan.stages[0].spec, tmp_path / "run")
    lines = list(read_jsonl(done.metrics))
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert any("eval/loss" in line for line in lines)
    assert trained in texts
