"""The loss that balances experts: transformers' own number and gradient, in each layout and under accumulation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.in_process import ADAPTER, make_data, make_step, train
from tests.zoo import faith
from tests.zoo.families import build
from transformers import AutoConfig, AutoModelForCausalLM

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import Full
from ftlaunch.recipe.model import Model
from ftlaunch.run.files import read_jsonl
from fttrain.data.batches import collate
from fttrain.data.token_set import Group
from fttrain.model.scorer import Scorer, load_base
from fttrain.stages.sft import CrossEntropy

WEIGHT = 0.5
FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss"]


def asking(name: str, folder: Path) -> Path:
    """A tiny model whose config asks for the loss."""
    model = build(name, folder)
    config = AutoConfig.from_pretrained(model)
    config.output_router_logits, config.router_aux_loss_coef = True, WEIGHT
    config.save_pretrained(model)
    return model


def expected(folder: Path) -> tuple[float, float]:
    """Loss and gradient norm of transformers' own forward over a padded batch of rows."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    rows = faith.rows()
    ids, labels, mask = (torch.full((len(rows), max(len(ids) for ids, _ in rows)), fill) for fill in (0, -100, 0))
    for place, (row, trained) in enumerate(rows):
        ids[place, : len(row)] = torch.from_numpy(row).long()
        labels[place, : len(row)] = torch.where(torch.from_numpy(trained), torch.from_numpy(row).long(), -100)
        mask[place, : len(row)] = 1
    out = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    assert out.aux_loss > 0
    out.loss.backward()
    return float(out.loss.detach()), faith._norm(model)


@pytest.mark.parametrize("layout", ["packed", "padded", "alone"])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_models_own(name: str, layout: str, tmp_path: Path) -> None:
    folder = asking(name, tmp_path / "model")
    packing = layout == "packed"
    base = load_base(Model(path=str(folder), dtype="fp32"), dtype=torch.float32, packing=packing).train()
    scorer = Scorer(base.requires_grad_(True))
    scorer.router_weight = WEIGHT
    if layout == "alone":
        scorer.compute_alone()
    groups = [Group((row,)) for row in faith.rows()]
    scores = scorer(collate(groups, packing=packing, chunks=1, device=faith.CPU))
    loss = CrossEntropy()._of(scores) / len(scores.smoothed_N)
    loss.backward()
    wanted, norm = expected(folder)
    assert float(loss.detach()) == pytest.approx(wanted, abs=2e-6)
    assert faith._norm(base) == pytest.approx(norm, rel=1e-5)


def steps(model: Path, folder: Path, data: Path, **stage: Any) -> list[dict[str, Any]]:
    folder.mkdir()
    settings = {"steps": 2, "batch_size": 4, "adapter": Full(), "learning_rate": 1e-3, **stage}
    done = train(make_step(model, make_data(data), **settings), folder)
    return [line for line in read_jsonl(done.metrics) if "loss" in line]


def test_full_tuning_adds_what_the_config_asks_for(rows_file: Path, tmp_path: Path) -> None:
    model = asking("mixtral", tmp_path / "model")
    told = {
        name: steps(model, tmp_path / name, rows_file, **stage)[0]
        for name, stage in {
            "asked": {},
            "off": {"router_loss": 0.0},
            "padded": {"packing": False},
            "accumulated": {"micro_batch_size": 2},
        }.items()
    }
    assert "router_loss" not in told["off"]
    for name in ("asked", "padded", "accumulated"):
        assert told[name]["loss"] - told["off"]["loss"] == pytest.approx(told[name]["router_loss"], abs=1e-5)
    assert told["asked"]["grad_norm"] == pytest.approx(told["padded"]["grad_norm"], rel=1e-4)
    assert told["asked"]["router_loss"] > WEIGHT  # times 1 at least, where experts are not used evenly


def test_an_adapter_goes_without_unless_told(
    rows_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = asking("mixtral", tmp_path / "model")
    assert "router_loss" not in steps(model, tmp_path / "without", rows_file, adapter=ADAPTER)[0]
    assert "left out of the loss: 0.5 times" in capfd.readouterr().out
    assert "router_loss" in steps(model, tmp_path / "with", rows_file, adapter=ADAPTER, router_loss=0.1)[0]


def test_a_model_without_experts_refuses_it(rows_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="llama models have no loss that balances experts"):
        steps(tiny_model, tmp_path / "refused", rows_file, router_loss=0.1)


def test_a_model_whose_code_fails_on_it_is_refused_at_the_start(rows_file: Path, tmp_path: Path) -> None:
    model = build("granitemoehybrid, dense", tmp_path / "model")
    with pytest.raises(UserError, match="granitemoehybrid fails on the loss that balances experts"):
        steps(model, tmp_path / "refused", rows_file, router_loss=0.1)
