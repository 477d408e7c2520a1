"""DPO: its reference, its variants, its layouts, and what a run leaves."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from tests.trainer.in_process import make_data, make_step, train
from tests.zoo.families import build
from transformers import AutoModelForCausalLM

from ftlaunch.recipe.adapter import Full, Lora
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.stages import Dpo, Orpo
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir
from ftlaunch.run.spec import StageSpec
from fttrain.distributed.stop_request import StoppedEarly
from fttrain.preference import reference

LN2 = math.log(2)


def lines(stage_dir: StageDir, key: str = "loss") -> list[dict[str, Any]]:
    return [line for line in read_jsonl(stage_dir.metrics) if key in line]


def losses(stage_dir: StageDir) -> list[float]:
    return [line["loss"] for line in lines(stage_dir)]


@pytest.fixture
def make(tiny_model: Path, pairs: Data) -> Callable[..., StageSpec]:
    return lambda **fields: make_step(tiny_model, fields.pop("data", pairs), kind=fields.pop("kind", Dpo), **fields)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pairs of each set that the reference was asked for in a forward pass."""
    calls: list[int] = []
    compute = reference._compute

    def counting(engine: Any, groups: Any, in_turn: Any) -> Any:
        calls.append(len(groups))
        return compute(engine, groups, in_turn)

    monkeypatch.setattr(reference, "_compute", counting)
    return calls


def test_it_starts_at_ln_2_and_learns_which_answer_is_better(
    make: Callable[..., StageSpec], pairs: Data, tmp_path: Path
) -> None:
    done = train(make(data=replace(pairs, test=6), steps=20, evaluate_every=10), tmp_path)
    first, *_, last = lines(done)
    assert first["loss"] == pytest.approx(LN2, abs=1e-6)
    assert first["rewards/accuracy"] == 0.0  # all rewards are 0
    assert last["loss"] < 0.3
    assert last["rewards/accuracy"] == 1.0
    held_out = lines(done, "eval/loss")
    assert [line["step"] for line in held_out] == [10, 20]
    assert held_out[-1]["eval/rewards/accuracy"] == 1.0
    assert held_out[-1]["eval/rewards/margin"] > 1.0


@pytest.mark.parametrize(
    ("fields", "first"),
    [
        ({"loss": "sigmoid", "label_smoothing": 0.2}, LN2),
        ({"loss": "robust", "label_smoothing": 0.2}, LN2),
        ({"loss": "hinge"}, 1.0),
        ({"loss": "ipo", "beta": 0.5}, 1.0),
    ],
)
def test_every_variant_starts_where_it_must_and_pulls_the_answers_apart(
    fields: dict[str, Any], first: float, make: Callable[..., StageSpec], tmp_path: Path
) -> None:
    done = train(make(**fields), tmp_path)
    assert losses(done)[0] == pytest.approx(first, abs=1e-5)
    assert losses(done)[-1] < first
    assert lines(done)[-1]["rewards/margin"] > 0


def test_sft_may_be_added(make: Callable[..., StageSpec], tmp_path: Path) -> None:
    plain, with_sft = (train(make(steps=1, sft_weight=w), tmp_path / str(w)) for w in (0.0, 0.5))
    orpo = train(make(kind=Orpo, steps=1, beta=0.0), tmp_path / "orpo")  # the cross-entropy alone
    assert losses(with_sft)[0] - losses(plain)[0] == pytest.approx(0.5 * losses(orpo)[0], abs=1e-5)


@pytest.mark.parametrize("kind", [Dpo, Orpo])
@pytest.mark.parametrize(
    "layout",
    [{"share_prompt": False}, {"packing": False, "share_prompt": False}, {"micro_batch_size": 2}],
    ids=["packed", "padded", "accumulated"],
)
def test_the_layout_changes_nothing(
    kind: type, layout: dict[str, Any], make: Callable[..., StageSpec], tmp_path: Path
) -> None:
    ours = lines(train(make(kind=kind, steps=3), tmp_path / "shared"))
    theirs = lines(train(make(kind=kind, steps=3, **layout), tmp_path / "plain"))
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert one["rewards/margin"] == pytest.approx(other["rewards/margin"], abs=1e-4)
        assert one["tokens"] == other["tokens"]


def test_precomputed_is_what_live_would_say_and_is_never_asked_twice(
    make: Callable[..., StageSpec], pairs: Data, tmp_path: Path, computed: list[int]
) -> None:
    data = replace(pairs, test=6)
    live = losses(train(make(data=data), tmp_path / "live"))
    assert computed == []
    step = make(data=data, reference="precomputed")
    first = losses(train(step, tmp_path / "kept"))
    assert computed == [18, 6]
    assert first == pytest.approx(live, abs=1e-5)
    (tmp_path / "again" / "cache").parent.mkdir()
    (tmp_path / "kept" / "cache").rename(tmp_path / "again" / "cache")
    assert losses(train(step, tmp_path / "again")) == first
    assert computed == [18, 6]
    assert losses(train(make(data=data, reference="precomputed", model_fields={"dtype": "bf16"}), tmp_path / "again2"))
    assert computed == [18, 6, 18, 6]


def test_another_start_has_another_reference(
    make: Callable[..., StageSpec], tiny_model: Path, rows_file: Path, tmp_path: Path, computed: list[int]
) -> None:
    step = make(reference="precomputed", steps=1)
    train(step, tmp_path)
    train(make_step(tiny_model, make_data(rows_file)), tmp_path)
    second = train(replace(step, start="01-sft/artifact"), tmp_path)
    assert computed == [24, 24]
    assert losses(second)[0] == pytest.approx(LN2, abs=1e-6)


def test_after_another_stage_the_reference_is_its_adapter(
    make: Callable[..., StageSpec], tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    sft = train(make_step(tiny_model, make_data(rows_file)), tmp_path)
    dpo = train(make(start="01-sft/artifact"), tmp_path)
    assert losses(dpo)[0] == pytest.approx(LN2, abs=1e-6)
    assert losses(dpo)[-1] < LN2 - 0.05
    before, after = (load_file(step.artifact / "adapter_model.safetensors") for step in (sft, dpo))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert not list(dpo.artifact.rglob("*reference*"))


def test_no_second_model_is_loaded(
    make: Callable[..., StageSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load = AutoModelForCausalLM.from_pretrained

    def counting(path: str, **options: Any) -> Any:
        loads.append(path)
        return load(path, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counting)
    train(make(steps=1), tmp_path / "live")
    train(make(steps=1, adapter=Full(), learning_rate=1e-4), tmp_path / "full")
    assert len(loads) == 2


@pytest.mark.parametrize("fields", [{}, {"adapter": Full(), "learning_rate": 1e-3}], ids=["live", "full"])
def test_a_stopped_stage_goes_on_as_if_it_had_not_been(
    fields: dict[str, Any], make: Callable[..., StageSpec], tmp_path: Path, computed: list[int]
) -> None:
    step = make(save_every=100, **fields)
    calm = train(step, tmp_path / "calm")
    with pytest.raises(StoppedEarly):
        train(step, tmp_path / "stopped", stop_after=3)
    asked = len(computed)
    resumed = train(step, tmp_path / "stopped")
    assert len(computed) == asked
    assert losses(resumed) == losses(calm)
    assert losses(calm)[0] == pytest.approx(LN2, abs=1e-6)
    name = "model.safetensors" if fields else "adapter_model.safetensors"
    ours, theirs = load_file(resumed.artifact / name), load_file(calm.artifact / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_orpo_learns_to_answer_and_which_answer_is_better(
    make: Callable[..., StageSpec], pairs: Data, tmp_path: Path
) -> None:
    done = train(make(kind=Orpo, data=replace(pairs, test=6), steps=20, beta=0.5), tmp_path)
    first, *_, last = lines(done)
    assert last["loss"] < first["loss"] - 0.5
    assert last["rewards/margin"] > first["rewards/margin"] + 0.1
    assert lines(done, "eval/loss")[-1]["eval/rewards/accuracy"] == 1.0


@pytest.mark.parametrize(
    ("family", "fields", "adapter"),
    [
        ("gpt2", {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}, Lora(rank=4)),
        ("llama", {"attention_dropout": 0.3}, Full()),
        ("opt", {"dropout": 0.3, "layerdrop": 0.3}, Full()),
        ("mixtral", {"router_jitter_noise": 0.3}, Lora(rank=4)),
    ],
)
def test_a_model_with_dropout_starts_at_ln_2_all_the_same(
    family: str, fields: dict[str, Any], adapter: Any, pairs: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(family, tmp_path / "model", **fields)
    # Without packing, attention's own dropout is drawn by another path.
    step = make_step(model, pairs, kind=Dpo, adapter=adapter, steps=1, packing=family != "llama")
    (first,) = lines(train(step, tmp_path))
    assert first["loss"] == pytest.approx(LN2, abs=1e-6)
    assert first["rewards/margin"] == pytest.approx(0, abs=1e-6)
    assert "dropout is off, as answers are compared" in capsys.readouterr().out


def test_dropout_of_the_model_itself_is_told_where_it_is_on(pairs: Data, tmp_path: Path, capsys: Any) -> None:
    model = build("gpt2", tmp_path / "model", resid_pdrop=0.3, embd_pdrop=0.0, attn_pdrop=0.0)
    train(make_step(model, pairs, steps=1), tmp_path)
    assert "dropout of the model's own config is on: resid_pdrop 0.3" in capsys.readouterr().out


def test_dropout_that_the_recipe_asks_for_is_told_once_the_policy_has_noise_that_its_reference_has_not(
    make: Callable[..., StageSpec], tmp_path: Path
) -> None:
    noisy = Lora(rank=4, alpha=8, dropout=0.5)
    first = train(make(adapter=noisy, steps=2), tmp_path)
    assert json.loads(first.result.read_text())["probe"]["warnings"] == []  # a new adapter adds nothing yet
    later = train(make(adapter=noisy, steps=1, start=str(first.artifact)), tmp_path)
    (warning,) = json.loads(later.result.read_text())["probe"]["warnings"]
    assert "dropout or noise moves the policy by" in warning
