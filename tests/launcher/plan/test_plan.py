"""What a plan says of stages that learn from pairs."""

import json
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.load import load_recipe
from ftlaunch.plan.plan import PlannedStage, make_plan

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


def planned(tmp_path: Path, kind: str, *, adapter: str = 'adapter.kind = "lora"', more: str = "") -> PlannedStage:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(adapter=adapter, kind=kind) + more)
    return make_plan(load_recipe(path).recipe, tmp_path).stages[1]


@pytest.mark.parametrize(
    ("kind", "adapter", "rate"),
    [
        ("dpo", 'adapter.kind = "lora"', 1e-5),
        ("dpo", "", 1e-6),
        ("orpo", 'adapter.kind = "lora"', 8e-5),
        ("reward", "", 1e-5),
        ("orpo", 'adapter.kind = "rslora"', 4e-5),
        ("dpo", 'adapter.kind = "dora"', 1e-5),
        ("dpo", 'adapter.kind = "pissa"', 5e-6),
    ],
)
def test_the_learning_rate_suits_stage_and_adapter(kind: str, adapter: str, rate: float, tmp_path: Path) -> None:
    stage = planned(tmp_path, kind, adapter=adapter)
    assert stage.spec.learning_rate == rate
    assert f"this suits {kind} with {stage.spec.adapter.__struct_config__.tag})" in stage.notes["learning rate"]
    assert stage.notes["batch"].startswith("8 pairs = 8 a micro-batch")


@pytest.mark.parametrize(
    ("adapter", "note"),
    [
        ('kind = "rslora"', "rsLoRA of rank 8 on all-linear, scale alpha / √rank = 5.657"),
        ('kind = "dora"\nlayers = "top:8"', "DoRA of rank 8 on all-linear of the top 8 layers, scale alpha / rank = 2"),
        ('kind = "pissa"\nlayers = [0, 3]', "PiSSA of rank 8 on all-linear of layers 0, 3, scale alpha / rank = 2"),
        ('kind = "adalora"', "AdaLoRA of rank 12, pruned to 8 on average, on all-linear, scale alpha / first rank ="),
        ('kind = "prefix"', "prefix tuning: keys and values of 20 virtual tokens in every layer"),
        ('kind = "prompt"\ninit = "random"', "prompt tuning: embeddings of 20 virtual tokens, which begin as noise"),
        ('kind = "p_tuning"\nencoder = "lstm"', "P-tuning: embeddings of 20 virtual tokens, made by an LSTM"),
        ('kind = "lora"\nlayers = "every:4"\ntargets = ["q"]', "on q of the last of every 4 layers, scale"),
    ],
)
def test_the_adapter_and_its_scale_are_told(adapter: str, note: str, tmp_path: Path) -> None:
    assert note in planned(tmp_path, "dpo", adapter=f"adapter.{adapter}".replace("\n", "\nadapter.")).notes["adapter"]


def test_lora_plus_tells_both_rates(tmp_path: Path) -> None:
    plus = 'adapter.kind = "lora"\noptimizer.lora_plus_ratio = 16'
    assert ", of B matrices 0.00016 (LoRA+)" in planned(tmp_path, "dpo", adapter=plus).notes["learning rate"]


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


@pytest.mark.parametrize(
    ("config", "note"),
    [
        ({"model_type": "llama"}, None),
        ({"model_type": "bloom"}, "rows are padded, not packed{}: bloom attends by code of its own"),
        (
            {"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]},
            "rows are padded, or packed by the kernels of causal-conv1d, mamba-ssm{}: granitemoehybrid"
            " carries a state from token to token, which would run on into the next row",
        ),
        ({"model_type": "granitemoehybrid", "layer_types": ["attention", "attention"]}, None),
        (
            {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text"}},
            "rows are padded, or packed by the kernels of causal-conv1d, flash-linear-attention{}: qwen3_5"
            " carries a state from token to token, which would run on into the next row",
        ),
    ],
)
def test_the_plan_says_which_models_rows_are_padded(config: dict[str, Any], note: str | None, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        RECIPE.format(adapter=f'model.path = "{model}"', kind="dpo").replace('model.path = "owner/model"\n', "")
    )
    sft, dpo = make_plan(load_recipe(recipe).recipe, tmp_path).stages
    assert sft.notes.get("layout") == (note and note.format(""))
    assert dpo.notes.get("layout") == (note and note.format(", and prompts are not shared"))


def test_the_plan_says_which_dropout_the_model_has_of_its_own(tmp_path: Path) -> None:
    rates = {"attn_pdrop": 0.1, "resid_pdrop": 0.25, "embd_pdrop": 0.0, "summary_first_dropout": 0.1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **rates}))
    recipe = tmp_path / "recipe.toml"
    text = RECIPE.format(adapter=f'model.path = "{tmp_path}"', kind="dpo")
    recipe.write_text(text.replace('model.path = "owner/model"\n', ""))
    sft, dpo = make_plan(load_recipe(recipe).recipe, tmp_path / "run").stages
    assert sft.notes["dropout"] == "on in training, as the model's config has it: attn_pdrop 0.1, resid_pdrop 0.25"
    assert "dropout" not in dpo.notes


def test_the_plan_says_whether_the_loss_that_balances_experts_counts(tmp_path: Path) -> None:
    def note(adapter: str, loss: str = "", **config: Any) -> str | None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", **config}))
        recipe = tmp_path / "recipe.toml"
        text = RECIPE.format(adapter=f'model.path = "{tmp_path}"\nadapter.kind = "{adapter}"', kind="dpo")
        text = text.replace('kind = "sft"', f'kind = "sft"\n{loss}')
        recipe.write_text(text.replace('model.path = "owner/model"\n', ""))
        return make_plan(load_recipe(recipe).recipe, tmp_path / "run").stages[0].notes.get("router loss")

    asks = {"output_router_logits": True, "router_aux_loss_coef": 0.02}
    assert note("lora", output_router_logits=False, router_aux_loss_coef=0.02) is None
    said = note("lora", **asks)
    assert said is not None
    assert said.startswith("left out: the model's config asks for 0.02 times the loss that balances experts; router_")
    assert note("full", **asks) == "0.02 times the loss that balances experts is added"
    assert note("full", "router_loss = 0", **asks) is None
    assert note("lora", "router_loss = 0.1", **asks) == "0.1 times the loss that balances experts is added"
