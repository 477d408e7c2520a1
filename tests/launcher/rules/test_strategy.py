"""`parallel.strategy = "auto"`: what is chosen, why, and what is refused."""

from pathlib import Path
from unittest import mock

import pytest

from ftlaunch import rules
from ftlaunch.errors import RecipeError
from ftlaunch.plan import machine
from ftlaunch.plan.cost import devices
from ftlaunch.plan.machine import Machine

RECIPE = """
name = "auto"
[model]
path = "meta-llama/Meta-Llama-3-8B"
[adapter]
kind = "{method}"
[data.rows]
path = "owner/rows"
prompt = "{{q}}"
completion = "{{a}}"
[[stage]]
kind = "sft"
data = "rows"
micro_batch_size = 1
activation_checkpointing = true
[parallel]
strategy = "auto"
procs_per_node = {processes}
"""
H100 = Machine((("NVIDIA H100 80GB HBM3", 9),), None)


@pytest.fixture(autouse=True)
def _on_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "look", lambda: H100)
    monkeypatch.setattr(devices, "_gpu_memory", lambda: None)


def loaded(folder: Path, method: str, processes: int, *settings: str) -> rules.Loaded:
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(method=method, processes=processes))
    return rules.load_and_check(path, settings)


@pytest.mark.parametrize(
    ("method", "processes", "strategy"),
    [("lora", 1, "single"), ("lora", 8, "ddp"), ("full", 8, "zero1"), ("full", 4, "zero2")],
)
def test_the_cheapest_that_fits_is_taken(tmp_path: Path, method: str, processes: int, strategy: str) -> None:
    found = loaded(tmp_path, method, processes)
    assert found.recipe.parallel.strategy == strategy
    assert found.is_for_here
    assert any(remark.startswith(f"parallel.strategy: {strategy} (auto)") for remark in found.remarks)


def test_why_others_were_passed_over_is_told(tmp_path: Path) -> None:
    (told,) = [remark for remark in loaded(tmp_path, "full", 4).remarks if "(auto)" in remark]
    assert "ddp: 01-sft needs 1" in told
    assert "zero1: 01-sft needs " in told


def test_where_nothing_fits_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match='"auto" finds none that fits: ddp: 01-sft needs '):
        loaded(tmp_path, "full", 2)


@pytest.mark.parametrize("setting", ["model.path=owner/model", "parallel.device=cuda"])
def test_what_nobody_knows_is_refused(tmp_path: Path, setting: str) -> None:
    bare = mock.patch.object(machine, "look", return_value=Machine((), None))
    with bare, pytest.raises(RecipeError, match="cannot tell"):
        loaded(tmp_path, "lora", 1, setting)


def test_what_is_written_is_left_alone(tmp_path: Path) -> None:
    found = loaded(tmp_path, "lora", 8, "parallel.strategy=zero3")
    assert found.recipe.parallel.strategy == "zero3"
    assert not found.is_for_here
    assert not [remark for remark in found.remarks if "(auto)" in remark]
