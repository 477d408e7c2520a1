"""AdaLoRA against PEFT's: forwards, backwards, and what is pruned when; resumed, and as a plain adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.trainer import in_process
from tests.trainer.adapters.conftest import IDS, base_of, logits

from ftlaunch.recipe.adapter import Adalora
from ftlaunch.recipe.data import Data
from ftlaunch.run.files import read_jsonl
from fttrain import adapters
from fttrain.adapters.adalora import RankAllocator
from fttrain.distributed.stop_request import StoppedEarly

STEPS = 20
SPEC = Adalora(rank=2, alpha=8, initial_rank=4, prune_after=0.1, prune_until=0.7, prune_every=2)


def pefts(model: Path) -> Any:
    config = AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=4,
        target_r=2,
        lora_alpha=8,
        target_modules="all-linear",
        tinit=2,
        tfinal=6,
        deltaT=2,
        total_step=STEPS,
        orth_reg_weight=0.5,
    )
    return get_peft_model(base_of(model), config)


def pairs_of(ours: Any, theirs: Any) -> dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """Our weights and PEFT's, by our name; theirs has a column where ours has a row."""
    others = dict(theirs.named_parameters())
    found = {}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            there = name.replace(".adalora.lambdas", ".lora_E.default").replace(".default.weight", ".default")
            found[name] = (parameter, others[there])
    return found


def test_every_step_and_choice_is_pefts(family: Callable[[str], Path]) -> None:
    ours: Any = adapters.attach(base_of(family("llama")), SPEC, None, in_fp32=True)
    theirs = pefts(family("llama"))
    both = pairs_of(ours, theirs)
    assert len(both) == 3 * 14
    with torch.no_grad():
        for mine, other in both.values():
            mine.copy_(other.view_as(mine))
    allocator = RankAllocator(ours, SPEC, STEPS)
    sides = [torch.optim.SGD([pair[side] for pair in both.values()], lr=0.3) for side in (0, 1)]
    weights = {name: pair[0] for name, pair in both.items()}
    for step in range(1, STEPS + 1):
        ours(IDS, labels=IDS).loss.backward()
        theirs(IDS, labels=IDS).loss.backward()
        gradients = {name: torch.as_tensor(weights[name].grad).clone() for name in allocator.watched}
        for side in sides:
            side.step()
        with torch.no_grad():
            for name, value in allocator.update(weights, gradients).items():
                weights[name].copy_(value)
        theirs.base_model.update_and_allocate(step)
        for side in sides:
            side.zero_grad()
        for name, (mine, other) in both.items():
            torch.testing.assert_close(mine, other.view_as(mine), atol=1e-5, rtol=1e-3, msg=f"step {step}: {name}")
    assert allocator.measures()["rank/mean"] == 2.0
    assert allocator.measures()["rank/most"] > allocator.measures()["rank/least"]
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-3)


def test_the_budget_falls_from_first_to_last(family: Callable[[str], Path]) -> None:
    model = adapters.attach(base_of(family("llama")), SPEC, None, in_fp32=True)
    allocator = RankAllocator(model, SPEC, STEPS)
    assert [allocator.budget(step) for step in (1, 2, 8, 14, 20)] == [56, 56, 31, 28, 28]


@pytest.fixture
def step(family: Callable[[str], Path], rows_file: Path) -> Any:
    rows = Data(path=str(rows_file), prompt="{question}", completion="{answer}")
    return in_process.make_step(family("llama"), rows, adapter=SPEC, steps=10, save_every=4)


def test_a_stopped_run_goes_on_to_the_last_bit(step: Any, tmp_path: Path, family: Callable[[str], Path]) -> None:
    calm = in_process.train(step, tmp_path / "calm")
    with pytest.raises(StoppedEarly):
        in_process.train(step, tmp_path / "stopped", stop_after=5)
    resumed = in_process.train(step, tmp_path / "stopped")
    one, two = (load_file(of.artifact / "adapter_model.safetensors") for of in (calm, resumed))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = [line for line in read_jsonl(calm.metrics) if "rank/mean" in line]
    assert [line["rank/mean"] for line in lines][0::9] == [4.0, 2.0]
    config = json.loads((calm.artifact / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert sum(config["rank_pattern"].values()) == 28
    again = in_process.train(
        in_process.make_step(
            family("llama"), *step.data.values(), adapter=SPEC, steps=1, learning_rate=1e-12, start="01-sft/artifact"
        ),
        tmp_path / "calm",
    )
    before, after = (logits(PeftModel.from_pretrained(base_of(family("llama")), s.artifact)) for s in (calm, again))
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-4)
