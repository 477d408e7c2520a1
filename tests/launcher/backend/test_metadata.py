"""How often a job asks a file system that all its nodes share: counted by what ranks and launchers do, not timed."""

import io
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftlaunch.backend.node_folder import node_folder
from ftlaunch.backend.slurm import paths
from ftlaunch.backend.supervisor import POLL_SECONDS, FailureWatch, Looks, look
from ftlaunch.run.layout import Attempt, StageDir
from fttrain.distributed.stop_request import StopRequest

SECONDS = 60
"""Of simulated time, with one optimizer step a second."""
PER_NODE = 8


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counter[str]:
    """Operations on files below the shared folder, and on others."""
    counts: Counter[str] = Counter()

    def counting(act: Any) -> Any:
        def counted_act(path: Any, *arguments: Any, **named: Any) -> Any:
            if isinstance(path, str | Path):
                counts["shared" if str(path).startswith(str(tmp_path)) else "local"] += 1
            return act(path, *arguments, **named)

        return counted_act

    for module, name in ((os, "stat"), (os, "utime"), (os, "open"), (io, "open")):
        monkeypatch.setattr(module, name, counting(getattr(module, name)))
    return counts


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def simulated(ranks: int, stage_dir: StageDir, attempt: Attempt, counted: Counter[str]) -> float:
    """Shared operations a second of a job on nodes of eight."""
    clock, nodes = Clock(), ranks // PER_NODE
    asking = [_asking(stage_dir, attempt, rank) for rank in range(ranks)]
    watching = [(Looks(nodes, node, clock), FailureWatch(0, attempt.on_node(node))) for node in range(nodes)]
    for node in range(nodes):
        attempt.on_node(node).launch_log.touch()
    counted.clear()
    for _ in range(SECONDS):
        for ask in asking:
            ask()
        for _ in range(round(1 / POLL_SECONDS)):
            for looks, failure in watching:
                if looks.are_due():
                    assert look(failure, lambda: _poll(stage_dir, attempt)) == "go on"
            clock.now += POLL_SECONDS
    return counted["shared"] / SECONDS


def _asking(stage_dir: StageDir, attempt: Attempt, rank: int) -> Any:
    """What a rank does at each step, as `python -m fttrain` sets it up."""
    stop_file = stage_dir.stop if rank == 0 else None
    itself: Any = SimpleNamespace(_stop_file=stop_file, _beat=attempt.beat(rank), _signal=None)
    itself.pending = lambda: StopRequest.pending(itself)
    return lambda: StopRequest.poll(itself)


def _poll(stage_dir: StageDir, attempt: Attempt) -> Any:
    """What a node of a SLURM job also asks at each look."""
    assert not paths.hung(attempt).exists()
    assert stage_dir.stop_reason() is None
    return "go on"


@pytest.mark.parametrize("ranks", [8, 512, 4096])
def test_operations_grow_slower_than_ranks(ranks: int, tmp_path: Path, counted: Counter[str]):
    """Before, it was 3 a rank each second with 512 and 4,096 ranks: 4,224 and 33,792."""
    stage_dir = StageDir(tmp_path / "01-sft")
    attempt = stage_dir.new_attempt()
    with node_folder() as attempt.local:
        found = simulated(ranks, stage_dir, attempt, counted)
    print(f"{ranks} ranks: {found:.0f} shared operations a second")
    nodes = ranks // PER_NODE
    assert found <= (60 if nodes == 1 else 10 + 1.25 * nodes)


def test_a_stop_is_seen_by_one_rank_at_its_next_step(tmp_path: Path):
    stage_dir = StageDir(tmp_path / "01-sft")
    attempt = stage_dir.new_attempt()
    first, second = (_asking(stage_dir, attempt, rank) for rank in range(2))
    assert first() is None
    stage_dir.stop.touch()
    assert first() == "stop file"
    assert second() is None


def test_folders_of_killed_launchers_are_cleared_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with node_folder() as living:
        gone = living.with_name(living.name.replace(f"-{os.getpid()}-", "-4194399-"))
        gone.mkdir()
        with node_folder() as other:
            assert living.is_dir()
            assert other.is_dir()
            assert not gone.exists()
    assert not list(tmp_path.iterdir())
