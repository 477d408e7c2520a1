"""Shipped recipes on rows in the true shape of the data sets that they name, with a tiny model: looked over, shown, and
trained for two steps; those of several methods with every method, those of several stages in all of them."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.in_process import ALONE, StopAfter, start_afresh, train

from ftlaunch.compare.variants import variants
from ftlaunch.plan.plan import make_plan
from ftlaunch.recipe.stages import Training
from ftlaunch.rules import load_and_check
from ftlaunch.run.files import read_jsonl, write_json
from ftlaunch.run.layout import StageDir
from ftlaunch.tools import PreviewOptions
from fttrain.tools import preview
from fttrain.tools.output import answer

ROOT = Path(__file__).parents[3]
SHAPES = ROOT / "tests" / "shapes"
HERE = [
    *("model.dtype=fp32", "optimizer.name=adamw", "parallel.strategy=single"),
    *("parallel.device=cpu", "parallel.procs_per_node=1"),
]
"""What a recipe for large GPUs needs to be tried on a CPU, whatever it is."""


def shortened(stage: int | str) -> list[str]:
    """Settings of a stage for two steps."""
    keys = {"steps": 2, "batch_size": 4, "micro_batch_size": 2, "evaluate_every": 2, "save_every": 2, "warmup": 0}
    return [f"stage.{stage}.{key}={value}" for key, value in keys.items()]


EVERY = [*HERE, "model.quantization=none", *shortened("sft")]
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
        ["adapter.targets=all-linear"],
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

    assert answer(preview.main, PreviewOptions(recipe=loaded.recipe, rows=24, json=True)) == 0
    [shown] = json.loads(capsys.readouterr().out)
    texts = ["".join(piece["text"] for piece in sample if piece["trained"]) for sample in shown["samples"]]
    assert (shown["rows"], shown["kept"], len(texts)) == (24, 24, 24 - shown["held_out"])

    done = train(plan.stages[0].spec, tmp_path / "run")
    lines = list(read_jsonl(done.metrics))
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert any("eval/loss" in line for line in lines)
    assert trained in texts


def trained(stages: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[dict[str, Any]]]]:
    """Train planned stages in this process; return the name of each and its lines of metrics.jsonl."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    found = []
    for planned in stages:
        stage_dir = StageDir(folder / planned.name)
        stage_dir.path.mkdir(parents=True)
        start_afresh()
        module = importlib.import_module(f"fttrain.stages.{planned.spec.stage.__struct_config__.tag}")
        write_json(stage_dir.result, module.run(planned.spec, stage_dir, ALONE, StopAfter(None)))
        found.append((planned.name, list(read_jsonl(stage_dir.metrics))))
    return found


SWEPT = {
    "trivia_methods": ("trivia", "trivia_qa.parquet", ["stage.sft.eval_max_new_tokens=4"]),
    "e2e_rivals": ("e2e", "e2e_nlg.parquet", ["stage.sft.eval_max_new_tokens=4"]),
    "noisy_gemma_variants": ("dolly", "dolly.jsonl", ["model.quantization=none", "stage.sft.eval_max_new_tokens=4"]),
}


@pytest.mark.parametrize("name", SWEPT)
def test_each_method_of_a_comparison_trains(
    name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, file, further = SWEPT[name]
    rows = [f"data.{table}.path={SHAPES / file}", f"data.{table}.test=4"]
    settings = [*HERE, *shortened("sft"), f"model.path={tiny_model}", *rows, *further]
    labels = []
    for variant in variants([ROOT / "recipes" / f"{name}.toml"], settings):
        # The tiny model has no super weights: half of its layers instead.
        own = [one.replace("=super-weights", "=top:1") for one in variant.settings]
        plan = make_plan(load_and_check(variant.recipe, own).recipe, tmp_path)
        [(_, lines)] = trained(plan.stages[:1], tmp_path / variant.folder, monkeypatch)
        assert [line["step"] for line in lines if "loss" in line] == [1, 2]
        assert len([line for line in lines if "eval/loss" in line and len(line) > 5]) == 1
        labels.append(variant.label)
    assert len(labels) == {"trivia_methods": 6, "e2e_rivals": 6, "noisy_gemma_variants": 4}[name]


CHAINS = {
    "chain_rlhf": (
        {"dialogues": "ultrachat", "feedback": "uf_binarized", "prompts": "uf_binarized"},
        ["01-sft", "02-reward", "03-ppo"],
        ["stage.ppo.rollout_size=4", "stage.ppo.max_new_tokens=3"],
    ),
    "chain_sft_dpo": ({"dialogues": "ultrachat", "feedback": "uf_binarized"}, ["01-sft", "02-dpo"], []),
    "orpo": ({"feedback": "uf_binarized"}, ["01-orpo"], []),
    "bitnet": ({}, ["01-sft"], ["stage.sft.eval_prompts=2", "stage.sft.eval_max_new_tokens=2"]),
}


@pytest.mark.parametrize("name", CHAINS)
def test_all_stages_train(name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, names, further = CHAINS[name]
    settings = [*HERE, f"model.path={tiny_model}", *further, *(f"data.{table}.test=4" for table in files)]
    settings += [f"data.{table}.path={SHAPES / file}.parquet" for table, file in files.items()]
    settings += [setting for stage in names for setting in shortened(stage.partition("-")[2])]
    plan = make_plan(load_and_check(ROOT / "recipes" / f"{name}.toml", settings).recipe, tmp_path / "run")
    stages = [planned for planned in plan.stages if isinstance(planned.spec.stage, Training)]
    for (stage, lines), expected in zip(trained(stages, tmp_path / "run", monkeypatch), names, strict=True):
        assert stage == expected
        assert [line["step"] for line in lines if "loss" in line] == [1, 2]
