"""The policy, its reference and its value head, which share one base."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.trainer.in_process import ADAPTER
from tests.zoo.families import build
from transformers import AutoModelForCausalLM

from ftlaunch.recipe.adapter import Full, Lora
from ftlaunch.recipe.model import Model
from fttrain import adapters
from fttrain.data.batches import MicroBatch, collate
from fttrain.data.token_set import Group
from fttrain.model.scorer import load_base
from fttrain.ppo.actor import REFERENCE, ActorCritic

TEMPERATURE = 0.7


@pytest.fixture
def micro() -> MicroBatch:
    make = np.random.default_rng(5)
    rows = [(make.integers(0, 256, size=n, dtype=np.int32), np.arange(n) >= 4) for n in (9, 30, 12)]
    return collate([Group((row,)) for row in rows], packing=True, chunks=1, device=torch.device("cpu"))


def by_hand(model: Any, micro: MicroBatch) -> torch.Tensor:
    """Log-probabilities under plain transformers, row by row."""
    found, ids = [], micro.input_ids[0]
    for row in ids.split([9, 30, 12]):
        logps = (model(row[None]).logits[0] / TEMPERATURE).log_softmax(-1)
        found.append(logps[3:-1].gather(1, row[4:, None])[:, 0])
    return torch.cat(found)


def perturb(model: torch.nn.Module) -> None:
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def load(path: Path) -> torch.nn.Module:
    return load_base(Model(path=str(path), dtype="fp32"), dtype=torch.float32, packing=True)


@pytest.mark.parametrize("kind", ["fresh adapter", "going on with an adapter", "full"])
def test_the_reference_is_the_policys_start(kind: str, tiny_model: Path, tmp_path: Path, micro: MicroBatch):
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    start = None
    if kind == "going on with an adapter":
        plain = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        perturb(plain)
        plain.save_pretrained(start := tmp_path)
    adapter = Full() if kind == "full" else Lora(rank=4, alpha=8, dropout=0.5)
    policy = adapters.attach(load(tiny_model), adapter, start, in_fp32=True)
    if start is not None:
        adapters.add_frozen(policy, start, REFERENCE, in_fp32=True)
    frozen = load(tiny_model).requires_grad_(False) if kind == "full" else None
    actor = ActorCritic(policy, temperature=TEMPERATURE, frozen=frozen)
    trained = {name for name, parameter in actor.named_parameters() if parameter.requires_grad}
    assert not any("reference" in name or name.startswith("frozen") for name in trained)

    expected = by_hand(plain, micro).detach()
    torch.testing.assert_close(actor(micro).logps_N, expected, atol=1e-5, rtol=1e-5)
    perturb(policy)
    moved = actor(micro).logps_N
    assert not torch.allclose(moved, expected, atol=1e-2)
    with actor.using_adapter(REFERENCE), torch.no_grad():
        torch.testing.assert_close(actor(micro).logps_N, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actor(micro).logps_N, moved)
    assert {name for name, parameter in actor.named_parameters() if parameter.requires_grad} == trained


def test_values_are_a_linear_reading_of_the_hidden_states(tiny_model: Path, micro: MicroBatch):
    actor = ActorCritic(adapters.attach(load(tiny_model), ADAPTER, None, in_fp32=True), temperature=1.0)
    assert not actor(micro).values_N.any()
    torch.nn.init.normal_(actor.value_head.weight)
    torch.nn.init.constant_(actor.value_head.bias, 3.0)
    hidden = AutoModelForCausalLM.from_pretrained(tiny_model).model(micro.input_ids[:, :9]).last_hidden_state[0, 3:-1]
    expected = hidden @ actor.value_head.weight[0] + 3.0
    torch.testing.assert_close(actor(micro).values_N[:5], expected, atol=1e-4, rtol=1e-4)


def test_dropout_is_off_while_training(tiny_model: Path, micro: MicroBatch):
    noisy = adapters.attach(load(tiny_model), Lora(rank=4, alpha=8, dropout=0.5), None, in_fp32=True)
    perturb(noisy)
    actor = ActorCritic(noisy, temperature=1.0).train()
    torch.testing.assert_close(actor(micro).logps_N, actor(micro).logps_N, atol=0, rtol=0)


def test_the_value_head_reads_hidden_states_that_are_wider_than_the_token_table(micro: MicroBatch, tmp_path: Path):
    policy = ActorCritic(load(build("electra", tmp_path)), temperature=1.0)
    assert torch.equal(policy(micro).values_N, torch.zeros(len(micro.targets_N)))
