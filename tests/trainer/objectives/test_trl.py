"""Objectives of pairs against TRL 1.16 on the same model and pairs: rows, masks, loss and every gradient, in fp32."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from msgspec.structs import replace
from tests.trainer.in_process import make_data, make_step, train
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ftlaunch.recipe.data import Data
from ftlaunch.recipe.stages import Dpo
from ftlaunch.run.files import read_jsonl
from fttrain.data.batches import MicroBatch, collate
from fttrain.data.token_set import PairSet
from fttrain.data.tokens import tokenize
from fttrain.model import attention
from fttrain.model.scorer import RewardModel, Scorer
from fttrain.objectives import preference
from fttrain.preference.objective import answer_logps
from fttrain.stages import dpo

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # ORPO stands among its experiments
CPU = torch.device("cpu")
PAIRS = 6
Grads = dict[str, Tensor]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def lay(data: Data, tokenizer: Any, cache: Path) -> MicroBatch:
    """The first pairs, packed, with shared prompts."""
    found = tokenize(data, tokenizer, 0, cache).train
    assert isinstance(found, PairSet)
    return collate([found.group(row) for row in range(PAIRS)], packing=True, share=True, chunks=1, device=CPU)


@pytest.fixture
def micro(pairs: Data, tokenizer: Any, tmp_path: Path) -> MicroBatch:
    return lay(pairs, tokenizer, tmp_path / "cache")


@pytest.fixture
def rows(pair_rows: list[dict[str, str]]) -> Dataset:
    def turn(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    return Dataset.from_list(
        [
            {"prompt": turn("user", row["prompt"]), **{k: turn("assistant", row[k]) for k in ("chosen", "rejected")}}
            for row in pair_rows[:PAIRS]
        ]
    )


def moved(model: nn.Module) -> nn.Module:
    """The model a little way from where it was, so that it differs from its reference."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def load(path: Path, attn: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attn)


def grads(loss: Tensor, named: Iterable[tuple[str, nn.Parameter]]) -> Grads:
    names, parameters = zip(*named, strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


def settings(folder: Path) -> dict[str, Any]:
    AcceleratorState._reset_state(reset_partial_state=True)
    return {"output_dir": str(folder), "per_device_train_batch_size": PAIRS, "use_cpu": True, "bf16": False,
            "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}  # fmt: skip


def assert_same(ours: tuple[Tensor, Grads], theirs: tuple[Tensor, Grads]) -> None:
    assert ours[0].item() == pytest.approx(theirs[0].item(), abs=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        assert torch.allclose(ours[1][name], grad, atol=1e-5), name
    assert max(grad.abs().max() for grad in theirs[1].values()) > 1e-3


@pytest.fixture
def ours(tiny_model: Path, micro: MicroBatch) -> Callable[[Dpo], tuple[Tensor, Grads]]:
    """Loss and gradients of a DPO stage."""

    def told(stage: Dpo) -> tuple[Tensor, Grads]:
        with torch.no_grad():
            reference_G2, _ = answer_logps(Scorer(load(tiny_model, attention.NAME))(micro).logps_N, micro)
        model = moved(load(tiny_model, attention.NAME))
        logps_G2, lengths_G2 = answer_logps(Scorer(model)(micro).smoothed_N, micro)
        loss = dpo.loss(stage, logps_G2 - reference_G2, lengths_G2).mean()
        return loss, grads(loss, model.named_parameters())

    return told


VARIANTS: list[dict[str, Any]] = [
    {"loss": "sigmoid"},
    {"loss": "hinge"},
    {"loss": "ipo", "beta": 0.5},
    {"loss": "robust", "label_smoothing": 0.2},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: fields["loss"])
def test_dpo(
    fields: dict[str, Any], ours: Callable[..., Any], rows: Dataset, tiny_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    from trl import DPOConfig, DPOTrainer

    stage = Dpo(data="rows", **fields)
    config = DPOConfig(
        **settings(tmp_path), loss_type=[stage.loss], beta=stage.beta, label_smoothing=stage.label_smoothing
    )
    trainer = DPOTrainer(
        model=load(tiny_model, "eager"),
        ref_model=load(tiny_model, "eager"),
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    model = moved(trainer.model)
    loss = trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))
    assert_same(ours(stage), (loss, grads(loss, model.named_parameters())))


def test_orpo(pairs: Data, pair_rows: list[dict[str, str]], tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Plain text, as TRL's ORPO puts a second EOS after a chat template's line end.

    Its cross-entropy takes the prompt in; that of the answer alone, ours, stands in for it on both sides.
    """
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = ORPOTrainer(
        model=load(tiny_model, "eager"),
        args=ORPOConfig(**settings(tmp_path), beta=0.3, disable_dropout=False),
        train_dataset=Dataset.from_list(pair_rows[:PAIRS]),
        processing_class=tokenizer,
    )
    chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, next(iter(trainer.get_train_dataloader())))
    odds, *_ = trainer.odds_ratio_loss(chosen, rejected)
    theirs = (-chosen - odds).mean()
    model = load(tiny_model, attention.NAME)
    micro = lay(replace(pairs, template="none"), tokenizer, tmp_path / "cache")
    logps_G2, lengths_G2 = answer_logps(Scorer(model)(micro).smoothed_N, micro)
    ours = preference.orpo(logps_G2 / lengths_G2, beta=0.3).mean()
    named = trainer.model.named_parameters()
    assert_same((ours, grads(ours, model.named_parameters())), (theirs, grads(theirs, named)))


def test_reward(micro: MicroBatch, rows: Dataset, tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    from trl import RewardConfig, RewardTrainer

    tokenizer.pad_token = "<|im_start|>"  # EOS would be taken for padding where it ends an answer
    classifier = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=1, dtype=torch.float32, attn_implementation="eager"
    )
    margins = [0.5 * row for row in range(PAIRS)]
    trainer = RewardTrainer(
        model=classifier,
        args=RewardConfig(**settings(tmp_path), center_rewards_coefficient=0.1),
        train_dataset=rows.add_column("margin", margins),
        processing_class=tokenizer,
    )
    theirs = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    rewarder = RewardModel(load(tiny_model, attention.NAME))
    with torch.no_grad():
        rewarder.score.weight.copy_(classifier.score.weight)
    ours = preference.bradley_terry(
        rewarder(micro).view(-1, 2), torch.tensor(margins), margin=1.0, centering=0.1
    ).mean()
    named = (
        (
            name.removeprefix(
                "model.",
            ),
            parameter,
        )
        for name, parameter in rewarder.named_parameters()
    )
    assert_same((ours, grads(ours, named)), (theirs, grads(theirs, trainer.model.named_parameters())))


def test_a_dpo_stage_takes_the_steps_that_trl_takes(
    pairs: Data, pair_rows: list[dict[str, str]], tiny_model: Path, tokenizer: Any, rows_file: Path, tmp_path: Path
) -> None:
    """From the same adapter, with all pairs in each batch: losses and gradient norms of step after step."""
    from peft import PeftModel
    from trl import DPOConfig, DPOTrainer

    sft = train(make_step(tiny_model, make_data(rows_file), steps=2), tmp_path)
    shape = {"steps": 4, "batch_size": len(pair_rows), "schedule": "constant"}
    ours = train(make_step(tiny_model, pairs, kind=Dpo, start="01-sft/artifact", **shape), tmp_path)
    turn = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    common = settings(tmp_path / "trl") | {"per_device_train_batch_size": len(pair_rows)}
    trainer = DPOTrainer(
        model=PeftModel.from_pretrained(load(tiny_model, "eager"), str(sft.artifact), is_trainable=True),
        args=DPOConfig(
            **common, max_steps=4, learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, save_strategy="no"
        ),
        train_dataset=Dataset.from_list(
            [{key: [{"role": role, "content": row[key]}] for key, role in turn.items()} for row in pair_rows]
        ),
        processing_class=tokenizer,
    )
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    for one, other in zip((line for line in read_jsonl(ours.metrics) if "loss" in line), theirs, strict=True):
        assert one["loss"] == pytest.approx(float(other["loss"]), abs=1e-4)
        assert one["grad_norm"] == pytest.approx(float(other["grad_norm"]), rel=1e-3)
        assert one["rewards/chosen"] == pytest.approx(float(other["rewards/chosen"]), abs=1e-3)
