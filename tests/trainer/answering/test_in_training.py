"""Answers at the evaluations of a stage that trains: scored as an evaluate stage would, and training none the wiser."""

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from safetensors.torch import load_file
from tests.conftest import RunStages
from tests.trainer.conftest import RECIPE
from tests.trainer.in_process import make_data, make_step, train

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import Full, Lora, Prefix, Prompt, PTuning
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.noise import Gaussian
from ftlaunch.recipe.stages import METRICS, SCORES, Dpo, Orpo, Sft
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir
from fttrain.answering.examination import examine, set_exam
from fttrain.answering.generation import Decoding
from fttrain.distributed.stop_request import StoppedEarly
from fttrain.evaluation.scoring import load_metric, score
from fttrain.tools.chat import load
from fttrain.tools.evaluate import with_progress

ASKED = {"eval_metrics": ["bleu", "rouge", "chrf"], "eval_prompts": 5, "eval_max_new_tokens": 6}
KEYS = ["eval/bleu", "eval/rouge1", "eval/rouge2", "eval/rougeL", "eval/rougeLsum", "eval/chrf"]


def evaluations(done: StageDir) -> list[dict[str, Any]]:
    return [
        {key: line[key] for key in line if key != "time"} for line in read_jsonl(done.metrics) if "eval/loss" in line
    ]


def weights_are_equal(first: StageDir, second: StageDir) -> bool:
    one, other = (load_file(*done.artifact.glob("*model.safetensors")) for done in (first, second))
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def talking_model(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after some steps, so that it has something to say."""
    spec = make_step(tiny_model, make_data(rows_file), adapter=Full(), steps=24, save_every=24)
    return train(spec, tmp_path_factory.mktemp("talking")).artifact


WAYS: dict[str, dict[str, Any]] = {
    "dropout": {"adapter": Lora(rank=4, alpha=8, dropout=0.3), "activation_checkpointing": True},
    "full": {"adapter": Full(), "learning_rate": 1e-3, "noise": Gaussian(std=0.1)},
    "prefix": {"adapter": Prefix(virtual_tokens=3), "packing": False},
    "prompt": {"adapter": Prompt(virtual_tokens=3), "packing": False},
    "p-tuning": {"adapter": PTuning(virtual_tokens=3, encoder="lstm"), "packing": False},
    "dpo": {"kind": Dpo},
    "orpo": {"kind": Orpo, "adapter": Full(), "learning_rate": 1e-3},
}


@pytest.mark.parametrize("way", WAYS)
def test_scores_are_those_of_an_evaluate_stage_and_training_is_not_changed(
    way: str, talking_model: Path, rows_file: Path, pairs: Data, tmp_path: Path
) -> None:
    fields = {"kind": Sft, "steps": 4, "evaluate_every": 2, "learning_rate": 3e-2, **WAYS[way]}
    data = make_data(rows_file, test=8) if fields["kind"] is Sft else replace(pairs, test=6)
    plain, asking = (
        train(make_step(talking_model, data, **fields, **more), tmp_path / name)
        for name, more in (("plain", {}), ("asking", ASKED))
    )
    assert weights_are_equal(plain, asking)
    before, after = evaluations(plain), evaluations(asking)
    assert [{**line, **{key: after[at][key] for key in KEYS}} for at, line in enumerate(before)] == after

    model, tokenizer = load(str(asking.artifact))
    exam = set_exam(data, tokenizer, 7, {"answers"}, most=5)
    found = examine(model, tokenizer, exam, Decoding(6), with_progress)
    assert any(found.answers)
    told = score(ASKED["eval_metrics"], found.inputs, 0, 0).scores
    assert {key: after[-1][key] for key in KEYS} == {
        f"eval/{key}": pytest.approx(one.value) for key, one in told.items()
    }


def test_ranks_answer_together_under_zero3(
    talking_model: Path, rows_file: Path, run_stages: RunStages, tmp_path: Path
) -> None:
    """Five prompts for two ranks, who both take part in each pass, however long the other's answers are."""
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(model=talking_model, rows=rows_file, dropout=0.1))
    two = ["parallel.strategy=zero3", "parallel.procs_per_node=2", "stage.sft.steps=2", "stage.sft.evaluate_every=1"]
    plain = run_stages(path, tmp_path / "plain", *two).stage_dir("01-sft")
    for name, ways, decoding in (("greedy", {}, Decoding(6)), ("beams", {"eval_beams": 3}, Decoding(6, beams=3))):
        metrics = [f"stage.sft.{key}={json.dumps(value)}" for key, value in (ASKED | ways).items()]
        asking = run_stages(path, tmp_path / name, *two, *metrics).stage_dir("01-sft")
        assert weights_are_equal(plain, asking)
        assert [line["step"] for line in evaluations(asking)] == [1, 2]
        model, tokenizer = load(str(asking.artifact))
        exam = set_exam(make_data(rows_file, test=8), tokenizer, 7, {"answers"}, most=5)
        told = score(
            ASKED["eval_metrics"], examine(model, tokenizer, exam, decoding, with_progress).inputs, 0, 0
        ).scores
        assert told["chrf"].value
        expected = {f"eval/{key}": pytest.approx(one.value) for key, one in told.items()}
        assert {key: evaluations(asking)[-1][key] for key in KEYS} == expected


def test_drawn_answers_are_the_same_each_time_and_change_nothing_of_training(
    talking_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    data, fields = make_data(rows_file, test=8), {"steps": 2, "evaluate_every": 1, "adapter": Lora(dropout=0.3)}
    plain, drawn, again = (
        train(make_step(talking_model, data, **fields, **more), tmp_path / name)
        for name, more in (
            ("plain", ASKED),
            ("drawn", ASKED | {"eval_temperature": 2.0}),
            ("again", ASKED | {"eval_temperature": 2.0}),
        )
    )
    assert weights_are_equal(plain, drawn)
    assert evaluations(drawn) == evaluations(again)
    assert evaluations(drawn)[-1]["eval/chrf"] != evaluations(plain)[-1]["eval/chrf"]


def test_the_best_is_kept_by_a_score_over_a_stop(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    fields = {"steps": 6, "evaluate_every": 1, "keep": 1, "save_every": 6, "learning_rate": 3e-2, "best_by": "chrf"}
    asked = {**ASKED, "eval_metrics": ["chrf"]}
    spec = make_step(tiny_model, make_data(rows_file, test=8), **fields, **asked)
    whole = train(spec, tmp_path / "whole")
    with pytest.raises(StoppedEarly):
        train(spec, tmp_path / "stopped", stop_after=9)
    again = train(spec, tmp_path / "stopped")
    assert evaluations(again) == evaluations(whole)
    scores = [line["eval/chrf"] for line in evaluations(whole)]
    best = 1 + scores.index(max(scores))
    assert best != 1 + scores.index(min(scores))
    for done in (whole, again):
        assert {int(one.name.removeprefix("step-")) for one in done.checkpoints.iterdir()} == {best, 6}
        assert json.loads(done.result.read_text())["best"] == {"step": best, "by": "chrf", "score": max(scores)}


def test_every_metric_of_answers_names_its_scores() -> None:
    for name, told in SCORES.items():
        found = load_metric(name).compute(predictions=["a b"], references=[["a b c"]])
        assert METRICS[name] == "answers"
        assert tuple(found) == told


def test_rows_without_answers_to_compare_are_refused_before_the_first_step(
    tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    """As where only the rows of the hub tell their format."""
    data = make_data(rows_file, test=8, train_on="all", format="prompt")
    with pytest.raises(UserError, match="only last answers"):
        train(make_step(tiny_model, data, **ASKED), tmp_path)
