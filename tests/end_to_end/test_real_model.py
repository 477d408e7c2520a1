"""The quickstart on the real model, shortened to four steps."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import Launch
from transformers import AutoModelForCausalLM

from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import RunDir
from fttrain.tools import chat

MODEL = os.environ.get("FTLAUNCH_TEST_MODEL")
QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
SETTINGS = {
    "stage.sft.steps": 4,
    "stage.sft.warmup": 1,
    "stage.sft.evaluate_every": 2,
    "data.restaurants.test": 8,
    "model.path": MODEL,
}
PROMPT = (
    "Describe the restaurant: name[The Blue Lantern], food[Thai], area[harbour], price[low],"
    " rating[9 out of 10], family friendly[yes]"
)


@pytest.mark.real_model
def test_the_quickstart_in_four_steps(tmp_path: Path, launch: Launch):
    assert MODEL is not None
    flags = [flag for key, value in SETTINGS.items() for flag in ("--set", f"{key}={value}")]
    launch("run", QUICKSTART, *flags, "--run-dir", tmp_path / "run")
    sft, merge = RunDir(tmp_path / "run").stage_dirs()
    lines = list(read_jsonl(sft.metrics))
    losses = [line["loss"] for line in lines if "loss" in line]
    evaluated = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert sft.read_spec().world_size == 2
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.2
    assert evaluated[1] < evaluated[0]
    assert max(line.get("peak_memory_bytes", 0) for line in lines) < 4e9

    result = json.loads(merge.result.read_text())
    assert result["kl"] < 0.02
    assert result["top1_agreement"] > 0.9
    answers = [
        chat.say(*chat.load(path), [{"role": "user", "content": PROMPT}], 12) for path in (MODEL, str(merge.model))
    ]
    assert answers[0] != answers[1]
    weights = AutoModelForCausalLM.from_pretrained(merge.model).state_dict()
    before = AutoModelForCausalLM.from_pretrained(MODEL).state_dict()
    assert weights.keys() == before.keys()
    changed = {name for name, tensor in weights.items() if not torch.equal(tensor, before[name])}
    assert all(name.endswith("proj.weight") for name in changed)
    assert len(changed) == sum(name.endswith("proj.weight") for name in weights)
    print(f"loss {losses}, evaluation {evaluated}, answers {answers}", file=sys.stderr)
