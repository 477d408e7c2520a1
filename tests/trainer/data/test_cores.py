"""Work on all cores: results in order, and nothing that goes wrong in a process is lost or left running."""

import multiprocessing
import os
import signal
from collections.abc import Iterator

import pytest

from ftlaunch.errors import UserError
from ftlaunch.rows.template import DataError
from fttrain.data.cores import in_order


def work(piece: int) -> tuple[int, int]:
    if piece == -1:
        raise DataError("facts.jsonl:7", "field answer is null", "mend it")
    if piece == -2:
        raise ZeroDivisionError("of our own")
    if piece == -3:
        os.kill(os.getpid(), signal.SIGKILL)
    return piece, os.getpid()


def nothing() -> None:
    pass


def test_results_come_in_order_from_all_processes():
    taken = 0

    def pieces() -> Iterator[int]:
        nonlocal taken
        for piece in range(200):
            taken += 1
            yield piece

    found = []
    for result in in_order(work, pieces(), nothing, alone=2, processes=2):
        assert taken - len(found) <= 2 + 2 * 5, "pieces are read as they are needed"
        found.append(result)
    assert [piece for piece, _ in found] == list(range(200))
    assert [process for _, process in found[:2]] == [os.getpid()] * 2
    assert len({process for _, process in found}) == 3


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_pieces(count: int, processes: int):
    assert [piece for piece, _ in in_order(work, iter(range(count)), nothing, alone=2, processes=processes)] == [
        *range(count)
    ]


@pytest.mark.parametrize(
    ("piece", "kind", "says"),
    [
        (-1, UserError, "facts.jsonl:7: field answer is null"),
        (-2, RuntimeError, "ZeroDivisionError: of our own"),
        (-3, UserError, r"has ended \(exit code -9\)"),
    ],
)
def test_what_ends_a_process_is_told(piece: int, kind: type[Exception], says: str):
    with pytest.raises(kind, match=says):
        list(in_order(work, iter([1, 2, piece, 3]), nothing, alone=0, processes=2))
    assert not multiprocessing.active_children()


def test_a_tick_ends_everything():
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(in_order(work, iter(range(10**9)), tick, alone=0, processes=2))
    assert not multiprocessing.active_children()
