"""Steps whose loss or gradient is not finite: the weights never see them, the rows are named, and a policy decides."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.in_process import make_data, make_step, train
from torch import Tensor

from ftlaunch.errors import UserError
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir
from fttrain.distributed.stop_request import StoppedEarly
from fttrain.stages.sft import CrossEntropy

BAD = 4


class Infinite(torch.autograd.Function):
    """A number whose gradient is infinite."""

    @staticmethod
    def forward(_ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.inf


SPOIL: dict[str, Callable[[Tensor], Tensor]] = {"loss": lambda loss: loss * math.nan, "gradient": Infinite.apply}


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has the loss of the given optimizer steps go bad, one forward pass being one step."""

    def act(how: str, *steps: int) -> None:
        sound, count = CrossEntropy.loss, 0

        def loss(self: CrossEntropy, *arguments: Any) -> Tensor:
            nonlocal count
            count += 1
            value = sound(self, *arguments)
            return SPOIL[how](value) if count in steps else value

        monkeypatch.setattr(CrossEntropy, "loss", loss)

    return act


def lines(stage_dir: StageDir) -> list[dict[str, Any]]:
    return [line for line in read_jsonl(stage_dir.metrics) if "loss" in line]


def weights(stage_dir: StageDir) -> dict[str, Tensor]:
    return load_file(stage_dir.artifact / "adapter_model.safetensors")


@pytest.fixture
def start(tiny_model: Path, rows_file: Path, tmp_path: Path) -> Callable[..., StageDir]:
    """Trains six steps of one forward pass each, with a checkpoint at steps 2, 4 and 6."""
    return lambda **stage: train(make_step(tiny_model, make_data(rows_file), **stage), tmp_path)


@pytest.mark.parametrize("how", SPOIL)
def test_by_default_training_stops_and_names_the_rows(
    how: str, spoil: Callable[..., None], start: Callable[..., StageDir], tmp_path: Path, rows_file: Path
):
    spoil(how, BAD)
    with pytest.raises(UserError, match=f"step {BAD}: the {how} is n.*{rows_file.name}: '.*did not step") as caught:
        start()
    assert "on_nonfinite" in caught.value.remedy
    stage_dir = StageDir(tmp_path / "01-sft")
    assert len(lines(stage_dir)) == BAD - 1
    assert [path.name for path in stage_dir.checkpoints.glob("step-*")] == ["step-00000002"]


@pytest.mark.parametrize("how", SPOIL)
def test_a_skipped_step_moves_nothing(how: str, spoil: Callable[..., None], start: Callable[..., StageDir]):
    spoil(how, 5, 6)
    step = start(on_nonfinite="skip")
    for line in lines(step)[-2:]:
        assert (line["skipped"], line["grad_norm"]) == (1, None)
        assert (line["loss"] is None) == (how == "loss")
    four, six = (load_file(step.checkpoints / f"step-0000000{n}" / "rank0.safetensors") for n in (4, 6))
    assert all(torch.equal(four[name], six[name]) for name in four)


def test_after_a_skipped_step_a_resumed_run_is_the_same(
    spoil: Callable[..., None], tiny_model: Path, rows_file: Path, tmp_path: Path
):
    """The optimizer counts its own steps, which are fewer than the data's now."""
    spec = make_step(tiny_model, make_data(rows_file), on_nonfinite="skip")
    spoil("loss", 2)
    calm = train(spec, tmp_path / "calm")
    spoil("loss", 2)
    with pytest.raises(StoppedEarly):
        train(spec, tmp_path / "stopped", stop_after=3)
    resumed = train(spec, tmp_path / "stopped")
    ours, theirs = weights(resumed), weights(calm)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_rewinding_takes_the_newest_checkpoint_and_leaves_the_steps_since_out(
    spoil: Callable[..., None], start: Callable[..., StageDir]
):
    spoil("loss", 6)
    step = start(on_nonfinite="rewind")
    assert lines(step)[-1]["rewound_to"] == 4
    four, six = (load_file(step.checkpoints / f"step-0000000{n}" / "rank0.safetensors") for n in (4, 6))
    assert all(torch.equal(four[name], six[name]) for name in four if not name.startswith("rng|"))


def test_there_must_be_something_to_rewind_to(spoil: Callable[..., None], start: Callable[..., StageDir]):
    spoil("loss", 1)
    with pytest.raises(UserError, match="there is no checkpoint to go back to"):
        start(on_nonfinite="rewind")


def test_nothing_but_bad_steps_is_no_training(spoil: Callable[..., None], start: Callable[..., StageDir]):
    spoil("loss", *range(1, 20))
    with pytest.raises(UserError, match="11 steps in a row"):
        start(on_nonfinite="skip", steps=14)
