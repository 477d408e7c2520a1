"""Schedules and parameter groups."""

import math

import pytest
import torch

from ftlaunch.errors import UserError
from ftlaunch.recipe.stages import Optimizer, Sft
from fttrain.training import optim
from fttrain.training.optim import Schedule


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.5 * (1 + math.cos(3 * math.pi / 4))]),
    ],
)
def test_rates_by_hand(shape: str, expected: list[float]):
    schedule = Schedule(Sft(data="d", schedule=shape, warmup=2), peak=1.0, num_steps=6)
    assert [schedule(step) for step in range(1, 7)] == pytest.approx(expected)


def test_rates_equal_transformers_schedules():
    from transformers import get_cosine_schedule_with_warmup

    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=3e-4)
    theirs = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=5, num_training_steps=50)
    ours = Schedule(Sft(data="d", warmup=0.1), peak=3e-4, num_steps=50)
    for step in range(1, 51):
        if step > 5:  # theirs starts its warm-up at 0, a step that trains nothing
            assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        theirs.step()


def test_vectors_are_not_decayed():
    layer = torch.nn.Linear(4, 3)
    optimizer = optim.build(Optimizer(weight_decay=0.1), layer.named_parameters())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(layer.weight): 0.1, id(layer.bias): 0.0}


def test_lora_plus_is_pefts():
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(target_modules=["0"]))
    ours = optim.build(Optimizer(lora_plus_ratio=16), model.named_parameters())
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.5, loraplus_lr_ratio=16)
    rates = {id(p): 0.5 * group["times"] for group in ours.param_groups for p in group["params"]}
    assert rates == {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    assert {*rates.values()} == {0.5, 8.0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, so the paged form is allowed")
def test_paged_forms_need_a_gpu():
    with pytest.raises(UserError, match="needs a GPU"):
        optim.build(Optimizer(name="paged_adamw_8bit"), torch.nn.Linear(4, 3).named_parameters())
