"""[noise] tables: which are refused, which count for a stage, and what a plan says of them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ftlaunch.load import load_recipe
from ftlaunch.plan import resolve
from ftlaunch.plan.plan import make_plan
from ftlaunch.recipe.noise import HIDDEN_ACT, Gaussian, Multiplicative, NoNoise
from ftlaunch.rules import find_problems
from ftlaunch.run.spec import StageSpec

HEAD = """\
name = "demo"
model.path = "owner/model"
adapter.kind = "lora"
[data.qa]
path = "owner/rows"
prompt = "{question}"
completion = "{answer}"
"""
SFT = '[[stage]]\nkind = "sft"\ndata = "qa"\n'
MERGE = '[[stage]]\nkind = "merge"\n'
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def call(noise: str, *stages: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(f"noise = {{{noise}}}\n{HEAD}{''.join(stages or (SFT, MERGE))}")
        return path

    return call


def problems(path: Path, *overrides: str) -> list[tuple[str, str]]:
    return [(problem.key, problem.remedy) for problem in find_problems(load_recipe(path, overrides))]


@pytest.mark.parametrize(
    "noise",
    [
        'kind = "none"',
        'kind = "none", activation = "relu"',
        'kind = "multiplicative", std = 0.2',
        'kind = "gaussian", sites = ["act_fn"], schedule = "cosine", relative = true',
        'kind = "adversarial", norm = "linf", steps = 3',
        'kind = "drop_path", sites = "layers.[0-3].mlp"',
    ],
)
def test_what_is_supported_passes(noise: str, write: Write) -> None:
    assert problems(write(noise)) == []


@pytest.mark.parametrize(
    ("noise", "overrides", "key", "remedy"),
    [
        ('kind = "multiplicative", mean = 0.0', [], "noise.mean", "write mean = 1.0"),
        ('kind = "saturated", alpha = 1', [], "noise.alpha", "write alpha = 1.1"),
        ('kind = "gaussian", sites = "a("', [], "noise.sites", 'correct it, or write "mlp-activation"'),
        ('kind = "gaussian", sites = []', [], "noise.sites", 'write sites = "mlp-activation"'),
        ('kind = "adversarial"', ["stage.0.r_drop=1"], "stage[0].r_drop", "remove one"),
        ('kind = "adversarial"', ["stage.0.activation_checkpointing=true"], "stage[0].activation_checkpointing", ""),
        ('kind = "adversarial"', ["parallel.strategy=zero2"], "parallel.strategy", 'write strategy = "ddp"'),
        ('kind = "none"', ["stage.0.neftune_noise=sign"], "stage[0].neftune_noise", "add neftune_alpha"),
    ],
)
def test_what_makes_no_sense_is_refused(noise: str, overrides: list[str], key: str, remedy: str, write: Write) -> None:
    [(found, said)] = problems(write(noise, SFT), *overrides)
    assert found == key
    assert said.startswith(remedy)


def test_adversaries_are_for_sft(write: Write) -> None:
    pairs = '[data.pairs]\npath = "owner/pairs"\nformat = "preference"\n'
    dpo = pairs + '[[stage]]\nkind = "dpo"\ndata = "pairs"\n'
    assert [key for key, _ in problems(write('kind = "adversarial"', SFT, dpo))] == ["noise.kind"]
    assert problems(write('kind = "adversarial"', SFT, dpo + 'noise.kind = "none"\n')) == []


REPLACED = 'kind = "gaussian", activation = "{}"'


@pytest.mark.parametrize("name", ["golu", "selu", "prelu", *HIDDEN_ACT])
def test_a_merge_needs_an_activation_function_that_transformers_has(name: str, write: Write) -> None:
    found = [key for key, _ in problems(write(REPLACED.format(name)))]
    assert found == ([] if name in HIDDEN_ACT else ["stage[1]"])
    assert problems(write(REPLACED.format(name), SFT)) == []


def test_a_merge_needs_it_in_all_blocks_and_those_on_the_way_count(write: Write) -> None:
    assert [key for key, _ in problems(write('kind = "none", activation = "relu", sites = ["act_fn"]'))] == ["stage[1]"]
    assert [key for key, _ in problems(write('kind = "saturated"'))] == ["stage[1]"]
    other = SFT + 'adapter = {kind = "lora", rank = 4}\n'
    assert [key for key, _ in problems(write(REPLACED.format("golu"), SFT, other))] == ["stage[1].adapter"]
    merged_before = SFT + 'noise = {kind = "none", activation = "relu"}\n'
    assert problems(write(REPLACED.format("relu"), merged_before, other)) == []


def test_a_model_trained_in_full_has_one_activation_function(write: Write) -> None:
    path = write('kind = "none", activation = "golu", sites = ["act_fn"]', SFT)
    assert [key for key, _ in problems(path, "adapter.kind=full")] == ["noise.sites"]
    assert problems(path, "adapter.kind=full", "noise.sites=mlp-activation") == []


def steps(path: Path) -> list[StageSpec]:
    return [planned.spec for planned in make_plan(load_recipe(path).recipe, Path("run")).stages]


def test_a_stage_s_own_table_counts_whole(write: Write) -> None:
    own = SFT + 'noise = {kind = "multiplicative"}\n'
    first, second, merge = steps(write('kind = "gaussian", std = 0.3', SFT, own, MERGE))
    assert first.noise == Gaussian(std=0.3)
    assert second.noise == merge.noise == Multiplicative(mean=1.0, std=0.1)
    assert len({step.training_hash for step in steps(write('kind = "gaussian"', SFT, SFT))}) == 2
    assert steps(write('kind = "none"', SFT))[0].training_hash != first.training_hash


def test_what_is_worn_goes_along_the_chain_to_the_next_merge(write: Write) -> None:
    none = SFT + 'noise = {kind = "none"}\n'
    other = none + 'adapter = {kind = "lora", rank = 4}\n'
    recipe = load_recipe(write(REPLACED.format("relu"), SFT, none, other)).recipe
    stages = resolve.resolve(recipe)
    assert [len(stage.replaced_activations) for stage in stages] == [1, 1, 0]
    assert [stage.begins_on_merge for stage in stages] == [False, False, True]
    assert stages[1].tables.noise == NoNoise()


def test_a_plan_tells_of_noise_and_activation(write: Write) -> None:
    path = write('kind = "gaussian", std = 0.3, sites = ["act_fn", "mlp"], activation = "relu"', SFT)
    [planned] = make_plan(load_recipe(path).recipe, Path("run")).stages
    settings = "schedule constant, mean 0.0, std 0.3, relative False"
    assert planned.notes["noise"] == f"gaussian on act_fn, mlp ({settings}), in training only"
    assert planned.notes["activation"] == "relu takes the place of act_fn, mlp, in the artifact too"
    assert "noise" not in make_plan(load_recipe(write('kind = "none"')).recipe, Path("run")).stages[0].notes
