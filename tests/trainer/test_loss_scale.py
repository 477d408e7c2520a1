"""Training in fp16: how it is switched on, and the scale of the loss, which a resumed stage takes up where it was.

The scalers are accelerate's and DeepSpeed's own; only the GPU on which they would work is not there.
"""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from tests.trainer.in_process import make_step

from ftlaunch.plan.launch_config import deepspeed_json
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.model import Dtype, Model
from ftlaunch.recipe.stages import Parallel
from fttrain.engine import Engine

OVERFLOWS = [False, False, True, False, True, False, True, True, False]


def plain(monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, Any]:  # noqa: ARG001 the other's is needed
    """An engine without ZeRO, and a step that overflows or does not."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)

    def step(overflow: bool) -> None:
        optimizer.zero_grad()
        scaler.scale(weight.sum() * (torch.inf if overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()

    engine: Any = Engine.__new__(Engine)
    engine.zero_stage, engine._accelerator = 0, SimpleNamespace(scaler=scaler)
    return engine, step


def under_zero(monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, Any]:
    """The same with DeepSpeed's scaler."""
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)
    scaler = loss_scaler.DynamicLossScaler(
        init_scale=1024.0, scale_window=2, min_scale=1, delayed_shift=2, consecutive_hysteresis=False
    )
    engine: Any = Engine.__new__(Engine)
    engine.zero_stage = 2
    engine._wrapped = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler, dynamic_loss_scale=True))
    return engine, scaler.update_scale


@pytest.mark.parametrize("made", [plain, under_zero])
@pytest.mark.parametrize("stopped_at", range(1, len(OVERFLOWS)))
def test_a_resumed_stage_goes_on_with_the_scale_of_its_loss(
    made: Any, stopped_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scales(engine: Engine, step: Any, overflows: list[bool]) -> list[float]:
        found: list[float] = []
        for overflow in overflows:
            step(overflow)
            found.append(engine.loss_scale()["scale"])
        return found

    engine, step = made(monkeypatch)
    scales(engine, step, OVERFLOWS[:stopped_at])
    kept = json.loads(json.dumps(engine.loss_scale()))
    expected = scales(engine, step, OVERFLOWS[stopped_at:])
    resumed, step = made(monkeypatch)
    resumed.set_loss_scale(kept)
    assert scales(resumed, step, OVERFLOWS[stopped_at:]) == expected


@pytest.mark.parametrize("written", ["auto", "fp16"])
def test_deepspeed_trains_in_fp16_with_a_scale_that_it_finds(written: Dtype) -> None:
    from accelerate.utils import DeepSpeedPlugin

    step = make_step("/base", Data(path="/rows.jsonl"))
    spec = replace(step, model=Model(path="/base", dtype=written), parallel=Parallel(strategy="zero2"))
    config = json.loads(deepspeed_json(spec) or "")
    plugin: Any = DeepSpeedPlugin(hf_ds_config=config)
    plugin.set_mixed_precision("fp16")
    filled = plugin.deepspeed_config
    assert filled["fp16"]["enabled"] is True
    assert filled["bf16"]["enabled"] is False
    assert filled["fp16"].get("loss_scale", 0) == 0, "0 is DeepSpeed's word for a dynamic scale"
