"""`parallel.strategy = "auto"`: what is chosen, why, and what is refused."""

import itertools
import re
from pathlib import Path
from unittest import mock

import pytest

from ftlaunch import rules
from ftlaunch.errors import RecipeError
from ftlaunch.plan import machine
from ftlaunch.plan.cost import costs, devices
from ftlaunch.plan.machine import Machine
from ftlaunch.plan.plan import make_plan

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
LLAMA = "meta-llama/Meta-Llama-3-8B"
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


SIZES = ("meta-llama/Llama-3.2-3B", LLAMA, "meta-llama/Meta-Llama-3-70B")


@pytest.mark.parametrize("gigabytes", [24, 80])
@pytest.mark.parametrize("processes", [1, 2, 8])
def test_more_is_shared_out_only_where_less_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, gigabytes: int
) -> None:
    """What shares out more talks more: ZeRO-3 is never taken where whole weights fit one card, nor is any ZeRO where
    all that a rank holds does; and what is taken fits."""
    monkeypatch.setattr(devices, "_gpu_memory", lambda: gigabytes * 10**9)
    order = ("single",) if processes == 1 else ("ddp", "zero1", "zero2", "zero3")
    for model, method in itertools.product(SIZES, ("lora", "full")):
        asked = (f"model.path={model}", "data.rows.max_length=512", "stage.0.batch_size=8")
        fits = [name for name in order if _misfit(tmp_path, method, processes, name, asked) is None]
        if fits:
            assert loaded(tmp_path, method, processes, *asked).recipe.parallel.strategy == fits[0], (model, method)
            continue
        with pytest.raises(RecipeError, match='"auto" finds none that fits'):
            loaded(tmp_path, method, processes, *asked)


def _misfit(folder: Path, method: str, processes: int, strategy: str, asked: tuple[str, ...]) -> object:
    recipe = loaded(folder, method, processes, *asked, f"parallel.strategy={strategy}").recipe
    spec = make_plan(recipe, folder).stages[0].spec
    told = costs.of_spec(spec, devices.here(H100, spec.parallel), 2)
    assert isinstance(told, costs.Cost)
    return told.misfit


def test_why_others_were_passed_over_is_told(tmp_path: Path) -> None:
    (told,) = [remark for remark in loaded(tmp_path, "full", 4).remarks if "(auto)" in remark]
    assert "ddp: 01-sft needs 1" in told
    assert "zero1: 01-sft needs " in told


def test_where_nothing_fits_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match='"auto" finds none that fits: ddp: 01-sft needs '):
        loaded(tmp_path, "full", 2)


LONG = ("stage.0.batch_size=256", "stage.0.micro_batch_size=128", "data.rows.max_length=8192")


@pytest.mark.parametrize(
    ("method", "asked", "named"),
    [("full", (), ["procs_per_node", "adapter.kind", "offload"]), ("lora", LONG, ["micro_batch_size"])],
)
def test_where_nothing_fits_ways_out_are_told_that_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, asked: tuple[str, ...], named: list[str]
) -> None:
    monkeypatch.setattr(machine, "look", lambda: Machine(H100.gpus * 8, None))
    with pytest.raises(RecipeError) as refused:
        loaded(tmp_path, method, 2, *asked)
    (problem,) = refused.value.problems
    ways = problem.remedy.removeprefix("write for 01-sft one of: ").split("; ")
    for way, key in zip(ways, named, strict=True):
        assert key in way
        assert way.endswith(", which fits")
        written = re.findall(r'([\w.]+) = ("[^"]*"|\w+)', way)
        settings = [f"{key if '.' in key else f'stage.0.{key}'}={value}" for key, value in written]
        assert loaded(tmp_path, method, 2, *asked, *settings).recipe.parallel.strategy != "auto"


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
