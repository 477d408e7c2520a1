"""What a new kind costs: a toy of each sort is added to a copy of both packages, its files are counted, and it trains.

The toys are found by nothing but what they say of themselves: no list of kinds elsewhere is told of them.
"""

import difflib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.trainer.conftest import make_pairs

from ftlaunch.run.files import read_jsonl

ROOT = Path(__file__).parent.parent

NOISE = '''class Sprinkle(_Drawn, frozen=True, kw_only=True):
    """Noise of one size and either sign: y = a ± size."""

    size: Above0 = 0.1
    """Of the noise."""


Noise = (
    Sprinkle
    | NoNoise'''
SPRINKLE = """    Poisson,
    Sprinkle,"""
SPRINKLED = """    match noise:
        case Sprinkle():
            return a + strength * noise.size * torch.randn_like(a).sign()
        case Gaussian():"""

ADAPTER = '''class Twice(LowRank, frozen=True, kw_only=True):
    """LoRA whose product counts twice: y = Wx + 2·scale·BAx."""

    label: ClassVar[str] = "TwiceLoRA"
    rate: ClassVar[float] = 0.25


Adapter = Twice | Lora'''
TWICE = '''"""LoRA whose product counts twice, saved as plain LoRA."""

from ftlaunch.recipe.adapter import Twice
from fttrain.adapters.low_rank import Method as LowRankMethod


class Method(LowRankMethod[Twice]):
    """Layers whose scale is doubled."""

    def install(self, model, start):
        for _, layer in self.layers(model):
            layer.scaling[self.name] *= 2

    def as_plain_lora(self, model, weights, config):
        return {key: weight * (2 if ".lora_B." in key else 1) for key, weight in weights.items()}
'''

STAGE = '''class Simpo(Pairwise, frozen=True, kw_only=True):
    """Preference by the mean log-probability of answers, without a reference (arXiv 2405.14734)."""

    lora_rate: ClassVar[float] = 1e-2
    beta: Above0 = 2.0
    """Scale of the mean log-probabilities."""

    @property
    def objective(self) -> str:
        return f"SimPO, beta {self.beta:g}"


Stage = Simpo | Sft'''
OBJECTIVE = '''def simpo(mean_logps_G2: Tensor, *, beta: float) -> Tensor:
    """-log σ(β·h), h being the difference of the answers' mean log-probabilities."""
    return -F.logsigmoid(beta * _difference(mean_logps_G2))


def log1mexp('''
SIMPO = '''"""Preference by the mean log-probability of answers."""

from fttrain.model.scorer import Scorer
from fttrain.objectives import preference
from fttrain.preference.objective import Compared, Comparison, answer_logps
from fttrain.training.session import train


def run(spec, folder, world, stop):
    def compare(engine, micro):
        logps_G2, lengths_G2 = answer_logps(engine.scores(micro).smoothed_N, micro)
        means_G2, beta = logps_G2 / lengths_G2, spec.stage.beta
        return Compared(preference.simpo(means_G2, beta=beta), beta * means_G2.detach())

    return train(spec, folder, world, stop, lambda model, _: Scorer(model), lambda *_: Comparison(compare))
'''

BACKEND = '''"""Runs in the very process that asks for them."""

import sys

from ftlaunch.backend.driving import Driven


class Here(Driven):
    def drive_stages(self, run, display, interrupts):
        from fttrain.__main__ import main

        for stage_dir in run.stage_dirs():
            sys.argv[1:] = [str(stage_dir.path)]
            if code := main():
                return code
        return 0

    def require_nodes(self, plan):
        pass
'''
CHOICE = '''"""Runs in this process."""


def choose(run, cluster, otherwise):
    from ftlaunch.backend.here.backend import Here

    return Here()
'''

EDITS = {
    "noise": {
        "ftlaunch/recipe/noise.py": (("Noise = (\n    NoNoise", NOISE),),
        "fttrain/noise/kinds.py": (
            ("    Poisson,", SPRINKLE),
            ("    match noise:\n        case Gaussian():", SPRINKLED),
        ),
    },
    "adapter": {
        "ftlaunch/recipe/adapter.py": (("Adapter = Lora", ADAPTER),),
        "fttrain/adapters/twice.py": (("", TWICE),),
        "fttrain/adapters/__init__.py": (('    "dora": "dora",\n', '    "dora": "dora",\n    "twice": "twice",\n'),),
    },
    "stage": {
        "ftlaunch/recipe/stages.py": (("Stage = Sft", STAGE),),
        "fttrain/objectives/preference.py": (("def log1mexp(", OBJECTIVE),),
        "fttrain/stages/simpo.py": (("", SIMPO),),
    },
    "backend": {
        "ftlaunch/backend/here/__init__.py": (("", CHOICE),),
        "ftlaunch/backend/here/backend.py": (("", BACKEND),),
        "ftlaunch/backend/backends.py": (('    "slurm",\n', '    "slurm",\n    "here",\n'),),
    },
}
"""Sort of kind → file → what is replaced in it, by what; a new file's whole text takes the place of nothing."""

RECIPE = """
name = "toys"
[model]
path = "{model}"
dtype = "fp32"
[adapter]
kind = "twice"
rank = 4
[noise]
kind = "sprinkle"
[data.pairs]
path = "{pairs}"
format = "preference"
[parallel]
device = "cpu"
[[stage]]
kind = "simpo"
data = "pairs"
steps = 4
batch_size = 4
[[stage]]
kind = "merge"
"""


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.py"))}


def lines_added(before: str, after: str) -> int:
    return sum(line[:2] == "+ " for line in difflib.ndiff(before.splitlines(), after.splitlines()))


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both packages, side by side in one folder."""
    folder = tmp_path_factory.mktemp("overlay")
    for package in ("launcher/ftlaunch", "src/fttrain"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / Path(package).name, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def changed(overlay: Path) -> dict[str, dict[str, int]]:
    """With every toy added: sort of kind → each file of source that it has changed → lines added to it."""
    changed: dict[str, dict[str, int]] = {}
    for sort, edits in EDITS.items():
        before = contents(overlay)
        for name, replaced in edits.items():
            path = overlay / name
            path.parent.mkdir(exist_ok=True)
            path.touch()
            for old, new in replaced:
                text = path.read_text()
                assert text.count(old) == 1, (
                    f"{name} must have {old!r} once, where a toy is put: add new kinds after it, or mend EDITS"
                )
                path.write_text(text.replace(old, new))
        after = contents(overlay)
        files = [name for name, text in after.items() if before.get(name) != text]
        changed[sort] = {name: lines_added(before.get(name, ""), after[name]) for name in files}
    return changed


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in make_pairs()))
    (folder / "toys.toml").write_text(RECIPE.format(model=tiny_model, pairs=pairs))
    return folder / "toys.toml"


def ftlaunch(overlay: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ftlaunch", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(overlay), "XDG_CACHE_HOME": str(overlay / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_kind_costs_few_files(changed: dict[str, dict[str, int]]) -> None:
    costs = {sort: len(files) for sort, files in changed.items()}
    assert costs == {sort: len(edits) for sort, edits in EDITS.items()}  # what was changed is what was meant to be
    assert costs["stage"] <= 3
    assert costs["noise"] <= 2
    assert changed["adapter"].pop("fttrain/adapters/__init__.py") == 1
    assert len(changed["adapter"]) <= 2
    assert changed["backend"].pop("ftlaunch/backend/backends.py") == 1
    assert {Path(name).parent.name for name in changed["backend"]} == {"here"}


@pytest.mark.usefixtures("changed")
def test_toys_are_planned_by_what_they_say_of_themselves(overlay: Path, recipe: Path) -> None:
    planned = ftlaunch(overlay, "plan", recipe)
    assert planned.returncode == 0, planned.stderr
    for words in (
        "TwiceLoRA of rank 4 on all-linear, scale alpha / rank",
        "sprinkle on mlp-activation (schedule constant, size 0.1), in training only",
        "SimPO, beta 2",
        "0.0025",  # the stage's rate with LoRA times the adapter's
    ):
        assert words in planned.stdout


@pytest.mark.usefixtures("changed")
def test_toys_are_refused_by_what_they_are(overlay: Path, recipe: Path) -> None:
    settings = (
        *("adapter.experts=true", "model.quantization.kind=qat", "stage.0.packing=false"),
        "noise.sites=[]",
    )
    refused = ftlaunch(overlay, "validate", recipe, *(part for one in settings for part in ("--set", one)))
    assert refused.returncode == 2
    for words in (
        '"twice" has no form for stacked experts',
        'W + scale·BA is rounded as one weight, and "twice" has none',
        "padded answers cannot share their prompt",
        "names no module",
    ):
        assert words in refused.stderr


@pytest.fixture(scope="module")
def run(changed: dict[str, dict[str, int]], overlay: Path, recipe: Path) -> Path:  # noqa: ARG001 toys are in
    folder = recipe.parent / "run"
    done = ftlaunch(overlay, "run", recipe, "--run-dir", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_toys_train_together(run: Path) -> None:
    lines = [line for line in read_jsonl(run / "01-simpo/metrics.jsonl") if "loss" in line]
    assert len(lines) == 4
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {line["noise/scale"] for line in lines} == {1.0}


@pytest.mark.slow
def test_what_toys_leave_is_a_plain_adapter_that_merges(run: Path) -> None:
    weights = load_file(run / "01-simpo/artifact/adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for key, weight in weights.items() if ".lora_B." in key)
    assert json.loads((run / "02-merge/result.json").read_text())["effect"] > 0.99
