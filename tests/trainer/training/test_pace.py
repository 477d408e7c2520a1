"""How long each rank works by itself, told to all by the collective of a step."""

import multiprocessing
import os
import time
from pathlib import Path

import msgspec
import pytest
import torch
import torch.distributed as dist

from ftlaunch.run.pace import Pace
from fttrain.distributed.world import World
from fttrain.training import pace


def _rank(rank: int, store: Path, path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    world = World(rank, 2, rank, 2, torch.device("cpu"), (("here", 1), ("here", 2)))
    log = pace.PaceLog(world, path)
    for step in range(1, 6):
        told = log.told()
        log.note(step, world.sum(told))
        with log.working():
            time.sleep(0.4 * rank)
        world.sum([0.0])  # here rank 0 waits
    os._exit(0)


def test_the_rank_that_the_others_wait_for_is_told_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "SECONDS", 0.0)
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(rank, tmp_path / "store", tmp_path / "pace.json")) for rank in (0, 1)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(60)
        assert one.exitcode == 0
    found = msgspec.json.decode((tmp_path / "pace.json").read_bytes(), type=Pace)
    assert (found.step, found.stragglers()) == (4, [1])
    assert found.describe() is not None


def test_a_rank_alone_tells_nothing(tmp_path: Path) -> None:
    log = pace.PaceLog(World(0, 1, 0, 1, torch.device("cpu"), (("here", 1),)), tmp_path / "pace.json")
    before = dict(vars(log))
    with log.working():
        pass
    assert log.told() == []
    assert vars(log) == before, "nothing is kept that nobody takes"
