"""What a run has made, as its user is told."""

import json
from pathlib import Path

import pytest

from ftlaunch.run.layout import REWARD_HEAD, RunDir
from ftlaunch.run.outputs import describe, newest_output

RESULT = {"method": "dequantized", "max_logit_difference": 0.0312, "kl": 0.00012, "top1_agreement": 0.9987, "tried": {}}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with an adapter and a merge of it, both finished."""
    for made, result in (("01-sft/artifact", {}), ("02-merge/model", RESULT)):
        (tmp_path / "my run" / made).mkdir(parents=True)
        (tmp_path / "my run" / made).with_name("result.json").write_text(json.dumps(result))
    (tmp_path / "my run/01-sft/artifact/adapter_config.json").touch()
    return RunDir(tmp_path / "my run")


def test_a_merged_model_comes_with_its_likeness(run: RunDir) -> None:
    path = run.path / "02-merge/model"
    assert describe(run).splitlines() == [
        f"merged model: {path}",
        "  folded into the dequantized weights; against the adapter model: "
        "KL 0.00012 nats per token, max |Δlogit| 0.031, same first choice at 99.9% of positions",
        f"  try it: ftlaunch chat '{path}' --prompt \"…\"",
    ]


def test_a_reward_model_is_not_to_be_talked_with(run: RunDir) -> None:
    path = run.path / "02-merge/model"
    (path / REWARD_HEAD).touch()
    (path / "../result.json").write_text(json.dumps(RESULT | {"of": "rewards"}))
    assert describe(run).splitlines() == [
        f"merged reward model: {path}",
        "  folded into the dequantized weights; against the adapter model: "
        "KL 0.00012 nats per pair, max |Δreward| 0.031, same preference in 99.9% of pairs",
    ]


def test_a_result_of_another_version_is_no_error(run: RunDir) -> None:
    run.stage_dir("02-merge").result.write_text("{}")
    assert len(describe(run).splitlines()) == 2


def test_an_adapter_or_a_model_is_called_what_it_is(run: RunDir) -> None:
    run.stage_dir("02-merge").result.unlink()
    artifact = run.path / "01-sft/artifact"
    assert describe(run).startswith(f"adapter: {artifact}\n  try it: ")
    (artifact / "adapter_config.json").unlink()
    assert describe(run).startswith(f"model: {artifact}\n")


def test_only_what_a_finished_stage_left_counts(run: RunDir) -> None:
    assert newest_output(run, merged=True) == run.path / "02-merge/model"
    assert newest_output(run, merged=False) == run.path / "01-sft/artifact"
    for stage_dir in run.stage_dirs():
        stage_dir.result.unlink()
    assert newest_output(run, merged=True) is None
    assert describe(run) == ""
