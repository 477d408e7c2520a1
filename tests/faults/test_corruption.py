"""Whatever becomes of the bytes of a checkpoint is noticed, and the one before it is used and the bad one named."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.faults.ranks import Ranks, with_parallel, write_run

from ftlaunch.recipe.recipe import Recipe
from fttrain.checkpoint.manifest import newest_first, verify

Damage = Callable[[Path, random.Random], None]


@pytest.fixture(scope="module")
def checkpoints(ranks: Ranks, load: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 4 and 6 of two ranks under ZeRO-3."""
    stage_dir = write_run(with_parallel(load(), "zero3", 2), tmp_path_factory.mktemp("run")).stage_dir("01-sft")
    ranks.run(stage_dir)
    return stage_dir.checkpoints


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def extend(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 64)))


def blank(path: Path, draw: random.Random) -> None:
    """A block of zeros where there was something else, as after a lost write."""
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data))
    end = min(len(data), start + draw.choice([1, 512, 4096]))
    if not any(data[start:end]):
        data[start] = 1
    else:
        data[start:end] = bytes(end - start)
    path.write_bytes(data)


def swap(path: Path, _draw: random.Random) -> None:
    """The other rank's file under this one's name; a manifest gets a shard's bytes."""
    other = next(each for each in sorted(path.parent.iterdir()) if each != path and each.suffix == ".safetensors")
    shutil.copy(other, path)


def mix(path: Path, _draw: random.Random) -> None:
    """The file of the same name of another step."""
    shutil.copy(path.parent.with_name("step-00000004") / path.name, path)


def delete(path: Path, _draw: random.Random) -> None:
    path.unlink()


DAMAGES: tuple[Damage, ...] = (flip, flip, flip, truncate, extend, blank, swap, mix, delete)


def test_every_corruption_is_noticed(checkpoints: Path, trials: Callable[[int, int], int], tmp_path: Path):
    older, newest = Path(tmp_path / "step-00000004"), Path(tmp_path / "step-00000006")
    for folder in (older, newest):
        shutil.copytree(checkpoints / folder.name, folder)
    content = {path: path.read_bytes() for path in newest.iterdir()}
    assert len(content) == 4
    draw = random.Random(7)
    for _ in range(trials(1000, 10_000)):
        path = draw.choice(sorted(content))
        damage = draw.choice(DAMAGES)
        damage(path, draw)
        harmless = path.exists() and path.read_bytes() == content[path]
        if not harmless:
            problem = verify(newest)
            assert problem, f"{damage.__name__} of {path.name}"
            assert path.name in problem or path.suffix == ".json"
            assert next(each for each in newest_first(tmp_path) if verify(each) is None) == older
        path.write_bytes(content[path])
    assert [verify(path) for path in newest_first(tmp_path)] == [None, None]
