"""What the trainer leaves, read again: by this version, and of another one."""

from pathlib import Path

import msgspec
import pytest

from ftlaunch.run.files import write_json
from ftlaunch.run.records import (
    Counts,
    Divergence,
    EvaluationResult,
    Gap,
    MergeResult,
    Result,
    TrainingResult,
    read_result,
)

SCORES = {"bleu": 12.5, "perplexity": None}
EVALUATED = EvaluationResult(
    data="qa", examples=2, references=3, prompts_trained_on=0, scores=SCORES, intervals={"bleu": (10.0, 15.0)}
)


@pytest.mark.parametrize(
    ("kind", "result"),
    [
        ("sft", TrainingResult(steps=4, tokens=9, data={"qa": Counts(rows=3)}, artifact="artifact")),
        ("evaluate", EVALUATED),
        (
            "evaluate",
            msgspec.structs.replace(EVALUATED, base_scores=SCORES, differences={"bleu": Gap(1.0, (0.5, 2.0))}),
        ),
        ("merge", MergeResult(0.1, 1e-6, 1.0, method="base", tried={"base": Divergence(0.1, 1e-6, 1.0)})),
    ],
)
def test_a_result_is_read_as_it_was_written(tmp_path: Path, kind: str, result: Result) -> None:
    write_json(tmp_path / "result.json", result)
    assert read_result(tmp_path / "result.json", kind) == result


def test_what_a_stage_did_not_ask_is_absent(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", EVALUATED)
    keys = msgspec.json.decode((tmp_path / "result.json").read_bytes()).keys()
    assert list(keys) == ["data", "examples", "references", "prompts_trained_on", "scores", "intervals"]


def test_a_result_of_another_version_is_none(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"steps": "many"}')
    assert read_result(tmp_path / "result.json", "sft") is None
    assert read_result(tmp_path / "none.json", "sft") is None
