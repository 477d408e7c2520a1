"""What a plan says of stages that learn from pairs."""

from pathlib import Path

import pytest

from ftlaunch.load import load_recipe
from ftlaunch.plan import PlannedStep, make_plan

RECIPE = """
name = "chain"
model.path = "owner/model"
{adapter}
[data.rows]
path = "owner/rows"
prompt = "{{q}}"
completion = "{{a}}"
[data.pairs]
path = "owner/pairs"
format = "preference"
[[stage]]
kind = "sft"
data = "rows"
[[stage]]
kind = "{kind}"
data = "pairs"
"""


def planned(tmp_path: Path, kind: str, *, adapter: str = 'adapter.kind = "lora"', more: str = "") -> PlannedStep:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(adapter=adapter, kind=kind) + more)
    return make_plan(load_recipe(path).recipe, tmp_path).steps[1]


@pytest.mark.parametrize(
    ("kind", "adapter", "rate"),
    [
        ("dpo", 'adapter.kind = "lora"', 1e-5),
        ("dpo", "", 1e-6),
        ("orpo", 'adapter.kind = "lora"', 8e-5),
        ("reward", "", 1e-5),
    ],
)
def test_the_learning_rate_suits_stage_and_adapter(kind: str, adapter: str, rate: float, tmp_path: Path) -> None:
    step = planned(tmp_path, kind, adapter=adapter)
    assert step.step.learning_rate == rate
    assert f"this suits {kind} with {'lora' if adapter else 'full'}" in step.notes["learning rate"]
    assert step.notes["batch"].startswith("8 pairs = 8 a micro-batch")


def test_dpo_says_what_its_reference_is(tmp_path: Path) -> None:
    live = planned(tmp_path, "dpo", more="sft_weight = 0.5")
    assert live.notes["loss"] == "sigmoid, beta 0.1, 0.5 × SFT"
    assert live.notes["reference"] == (
        "01-sft/artifact as it is at the start, asked at each step; no second model is loaded"
    )
    kept = planned(tmp_path, "dpo", more='reference = "precomputed"').notes["reference"]
    assert kept == "01-sft/artifact, asked for all pairs before the first step; its answers are kept on disk"
    assert planned(tmp_path, "dpo", adapter="").notes["reference"] == kept


def test_orpo_and_reward_say_what_they_train(tmp_path: Path) -> None:
    assert (
        planned(tmp_path, "orpo").notes["loss"] == "cross-entropy of the chosen answer, 0.1 × odds ratio; no reference"
    )
    assert planned(tmp_path, "reward").notes["head"] == "one number at an answer's last token, new"
