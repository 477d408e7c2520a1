"""A save is killed, or refused, at every one of its file-system calls: what was good stays good."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.trainer.in_process import ALONE, make_data, make_step, start_afresh, train

from ftlaunch.errors import UserError
from ftlaunch.recipe.stages import Sft
from ftlaunch.run.layout import StageDir
from ftlaunch.run.spec import StageSpec
from fttrain import artifact
from fttrain.checkpoint.manifest import newest_first, verify
from fttrain.checkpoint.store import Checkpoints
from fttrain.engine import Engine
from fttrain.model.scorer import Scorer
from fttrain.training import session
from fttrain.training.counters import Progress

BEFORE, STEP = 2, 4


@pytest.fixture(scope="module")
def spec(tiny_model: Path, rows_file: Path) -> StageSpec:
    return make_step(tiny_model, make_data(rows_file), steps=BEFORE)


@pytest.fixture(scope="module")
def before(spec: StageSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run of two steps."""
    return train(spec, tmp_path_factory.mktemp("before")).checkpoints


@pytest.fixture(scope="module")
def engine(spec: StageSpec, before: Path) -> Engine:
    assert isinstance(spec.stage, Sft)
    start_afresh()
    origin = artifact.origin(spec, StageDir(before.parent))
    return session.build(spec, spec.stage, ALONE, origin, lambda model, _: Scorer(model))


def save(folder: Path, spec: StageSpec, engine: Engine) -> None:
    state = vars(Progress(step=STEP, updates=STEP))
    Checkpoints(folder, spec, engine).save(STEP, state, keep=1, best=None, is_last=True)


@pytest.fixture
def all_calls(
    before: Path, spec: StageSpec, engine: Engine, tmp_path: Path, count_calls: Callable[..., None]
) -> Callable[[str], Iterator[Path]]:
    """For each call of a save: the folder in which a save met its fault there."""

    def run(do: str) -> Iterator[Path]:
        folder = Path(shutil.copytree(before, tmp_path / "counted"))
        count_calls(folder)
        save(folder, spec, engine)
        number = int((tmp_path / "count").read_text())
        assert number > 20
        for at in range(1, number + 1):
            folder = Path(shutil.copytree(before, tmp_path / f"{do}-{at}"))
            count_calls(folder, at, do)
            yield folder
            os.environ.pop("LD_PRELOAD")
            assert Checkpoints(folder, spec, engine).load().step in (BEFORE, STEP), at
            save(folder, spec, engine)  # over whatever is left
            assert [path.name for path in folder.iterdir()] == [f"step-{STEP:08d}"], at
            assert verify(newest_first(folder)[0]) is None, at
            shutil.rmtree(folder)

    return run


def test_a_save_that_is_killed_at_any_call_leaves_a_good_checkpoint(
    all_calls: Callable[[str], Iterator[Path]], spec: StageSpec, engine: Engine
):
    found = set()
    for folder in all_calls("kill"):
        with pytest.raises(UserError, match=r"has ended \(exit code -9\)"):
            save(folder, spec, engine)
        good = [path.name for path in newest_first(folder) if verify(path) is None]
        assert good, list(folder.iterdir())
        bad_above = [path.name for path in newest_first(folder) if path.name > good[0]]
        assert not bad_above, "a checkpoint of the newer step would be passed over"
        found.add(good[0])
    assert found == {f"step-{BEFORE:08d}", f"step-{STEP:08d}"}


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_save_whose_call_fails_says_so_or_is_good(
    number: int, all_calls: Callable[[str], Iterator[Path]], spec: StageSpec, engine: Engine
):
    failed = 0
    for folder in all_calls(str(number)):
        message = error_of(lambda: save(folder, spec, engine))  # noqa: B023 called at once
        if message is None:
            assert newest_first(folder)[0].name == f"step-{STEP:08d}"
        else:
            failed += 1
            assert os.strerror(number) in message
            assert not list(folder.glob(".step-*"))
        assert verify(newest_first(folder)[0]) is None
    assert failed > 10


def error_of(act: Callable[[], None]) -> str | None:
    try:
        act()
    except UserError as error:
        return error.message
    return None
