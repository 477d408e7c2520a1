"""The wheel on a login node: its base dependencies and nothing else, in an environment and a folder of its own."""

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Launch
from tests.trainer.conftest import RECIPE

from ftlaunch.errors import BAD_INPUT

ROOT = Path(__file__).parents[2]
Run = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def ftlaunch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """The command that the installed wheel brings, called from an empty folder."""
    folder = tmp_path_factory.mktemp("wheel")
    quietly = ["--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *quietly, "--no-deps", "--wheel-dir", folder, ROOT], check=True
    )
    (wheel,) = folder.glob("ftlaunch-*.whl")
    venv.create(folder / "venv", with_pip=False)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", folder / "venv" / "bin" / "python", "install", *quietly),
            *("--constraint", ROOT / "constraints.txt", wheel),
        ],
        check=True,
    )
    (folder / "empty").mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}

    def call(*arguments: str | Path, code: int = 0) -> Run:
        command = [str(folder / "venv" / "bin" / "ftlaunch"), *map(str, arguments)]
        done = subprocess.run(command, cwd=folder / "empty", env=env, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return call


def test_recipes_are_listed_judged_and_planned(ftlaunch: Callable[..., Run], tiny_model: Path):
    here = ["--set", f"model.path={tiny_model}"]
    assert "quickstart" in json.loads(ftlaunch("recipes", "--json").stdout)
    assert ftlaunch("validate", "quickstart", *here).stdout == "quickstart.toml: ok — sft, merge on 2 processes\n"
    plan = ftlaunch("plan", "quickstart", *here).stdout
    assert "accelerate launch" in plan
    assert str(tiny_model) in plan
    assert ftlaunch("run", "quickstart", *here, "--dry-run").stdout == plan
    assert ftlaunch("--version").stdout.startswith("ftlaunch ")


def test_run_says_how_to_install_the_trainer(ftlaunch: Callable[..., Run], tiny_model: Path):
    said = ftlaunch("run", "quickstart", "--set", f"model.path={tiny_model}", code=BAD_INPUT).stderr
    assert "torch is not installed for" in said
    assert "→ pip install 'ftlaunch[train]'" in said


def test_a_run_made_elsewhere_is_watched(
    ftlaunch: Callable[..., Run], tmp_path: Path, tiny_model: Path, rows_file: Path, launch: Launch
):
    recipe, run = tmp_path / "tiny.toml", tmp_path / "run"
    recipe.write_text(RECIPE.format(model=tiny_model, rows=rows_file, dropout=0.0))
    launch("run", recipe, "--set", "stage.sft.steps=2", "--run-dir", run)
    assert "01-sft" in ftlaunch("status", run).stdout
    status = json.loads(ftlaunch("status", run, "--json").stdout)
    assert "done" in json.dumps(status)
    assert ftlaunch("logs", run).stdout
    assert "02-sft" in ftlaunch("logs", run, "--stage", "02-sft", code=BAD_INPUT).stderr
