"""Trials by the hundred: a sample of each in the tests, all of them with `make faults`."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.faults.ranks import Ranks
from tests.trainer.conftest import RECIPE

from ftlaunch.load import load_recipe
from ftlaunch.recipe import Recipe


@pytest.fixture(scope="session")
def trials(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """How many trials to make: `trials(sample, full)`."""
    full = request.config.getoption("--all-trials")
    return lambda sample, number: number if full else sample


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Ranks that start in a moment."""
    started = Ranks(tmp_path_factory.mktemp("cache"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def load(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """The tiny recipe with settings put in; with dropout, where it is to be the same bits."""

    def act(*settings: str, dropout: float = 0.0) -> Recipe:
        path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
        path.write_text(RECIPE.format(model=tiny_model, rows=rows_file, dropout=dropout))
        return load_recipe(path, settings).recipe

    return act


@pytest.fixture(scope="session")
def calls_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """calls.c as a library to be loaded ahead of libc."""
    library = tmp_path_factory.mktemp("library") / "calls.so"
    source = Path(__file__).with_name("calls.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library
