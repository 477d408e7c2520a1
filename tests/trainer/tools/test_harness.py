"""The bridge to lm-evaluation-harness: without it a remedy; with it, tasks of one's own need no network."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.trainer.in_process import make_data, make_step, train

from ftlaunch.errors import BAD_INPUT
from ftlaunch.tools import HarnessOptions
from fttrain.tools import harness
from fttrain.tools.output import answer

IS_THERE = find_spec("lm_eval") is not None
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{ask}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_scores_are_read_from_the_harnesss_keys() -> None:
    results = {"gsm8k": {"alias": "gsm8k", "exact_match,strict": 0.25, "exact_match_stderr,strict": 0.125, "n": 3},
               "arc": {"acc,none": 0.5, "acc_stderr,none": "N/A"}}  # fmt: skip
    expected = {"gsm8k": {"exact_match (strict)": (0.25, 0.125)}, "arc": {"acc": (0.5, None)}}
    assert harness.scores_of(results) == expected


@pytest.mark.skipif(IS_THERE, reason="lm-eval is installed")
def test_without_the_harness_there_is_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(harness.main, HarnessOptions(models=["m"], tasks=("arc_easy",))) == BAD_INPUT
    assert "pip install lm-eval" in capsys.readouterr().err


@pytest.mark.skipif(not IS_THERE, reason="lm-eval is not installed: pip install lm-eval")
def test_a_task_of_ones_own_is_scored_for_a_model_and_an_adapter(
    tiny_model: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    texts = [{"ask": f"{at}?", "choices": ["red lamp", "x"], "right": at % 2} for at in range(4)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "colours.yaml").write_text(TASK.format(rows=rows))
    adapter = train(make_step(tiny_model, make_data(rows_file), steps=1), tmp_path).artifact
    models = [str(tiny_model), str(adapter)]
    capsys.readouterr()
    assert answer(harness.main, HarnessOptions(models=models, tasks=("colours",), folder=str(folder), json=True)) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["models"] == {model: {"colours": {"acc": 0.5}} for model in models}
    assert answer(harness.main, HarnessOptions(models=models, tasks=("other",), folder=str(folder))) == BAD_INPUT
    assert "knows no task other" in capsys.readouterr().err
