"""Work that all cores of this node do, piece by piece, its results in the order of the pieces."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from ftlaunch.errors import UserError
from fttrain.distributed import sidecar

Piece = TypeVar("Piece")
Result = TypeVar("Result")

ALONE = 8
"""Pieces that this process does itself before it starts others, which takes seconds."""
MOST_PROCESSES = 64
IN_ADVANCE = 4
"""Pieces a process that may be done or under way after the first one that is not done."""
TICK_SECONDS = 0.2


def in_order(
    work: Callable[[Piece], Result],
    pieces: Iterator[Piece],
    tick: Callable[[], None],
    *,
    alone: int = ALONE,
    processes: int | None = None,
) -> Iterator[Result]:
    """`work` of each piece, in their order; it is pickled to as many processes as this one may use cores.

    `tick` is called all along and ends everything by raising. A UserError that `work` raises is raised here.
    """
    count = processes or min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    for piece in islice(pieces, alone if count > 1 else None):
        tick()
        yield work(piece)
    if (piece := next(pieces, None)) is not None:
        yield from _Pool(work, chain([piece], pieces), tick, count)


@dataclass(frozen=True)
class _Failed:
    """What a process says instead of a result: a user's mistake with its remedy, or the trace of one of ours."""

    message: str
    remedy: str | None = None


@dataclass
class _Worker:
    process: BaseProcess
    line: Connection
    piece: int | None = None
    """Number of the piece that it is at."""


class _Pool(Generic[Piece, Result]):
    """Processes that each have one piece at a time."""

    def __init__(
        self, work: Callable[[Piece], Result], pieces: Iterator[Piece], tick: Callable[[], None], count: int
    ) -> None:
        self._work = work
        self._pieces = enumerate(pieces)
        self._tick = tick
        self._most_in_advance = IN_ADVANCE * count
        self._count = count

    def __iter__(self) -> Iterator[Result]:
        workers = [self._start() for _ in range(self._count)]
        try:
            yield from self._results(workers)
        finally:
            for worker in workers:
                worker.process.kill()
            for worker in workers:
                worker.process.join()
                worker.line.close()

    def _start(self) -> _Worker:
        # Spawned and not forked: this process may hold threads of torch and of the tokenizer, whose locks a fork
        # copies.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._work, os.getpid()), daemon=True)
        process.start()
        # Or our end would never read the end of the file when the process dies.
        theirs.close()
        return _Worker(process, ours)

    def _results(self, workers: list[_Worker]) -> Iterator[Result]:
        done: dict[int, Result] = {}
        awaited, has_more = 0, True
        while True:
            for worker in workers:
                is_near = len(done) < self._most_in_advance
                if worker.piece is None and has_more and is_near:
                    has_more = self._hand_over(worker)
            busy = {worker.line: worker for worker in workers if worker.piece is not None}
            if not busy:
                return
            # The tick raises where the run is asked to stop: within a tick's length, however long a piece takes.
            self._tick()
            for line in wait(list(busy), TICK_SECONDS):
                worker = busy[line]  # type: ignore[index]
                assert worker.piece is not None
                done[worker.piece], worker.piece = self._heard(worker), None
            while awaited in done:
                yield done.pop(awaited)
                awaited += 1

    def _hand_over(self, worker: _Worker) -> bool:
        """Give a worker that waits the next piece; False where there is none."""
        number, piece = next(self._pieces, (None, None))
        if number is None:
            return False
        worker.piece = number
        with suppress(BrokenPipeError):  # `_heard` tells
            worker.line.send(piece)
        return True

    def _heard(self, worker: _Worker) -> Any:
        try:
            said = worker.line.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            message = f"a process that worked on the rows has ended (exit code {worker.process.exitcode})"
            remedy = "it was killed, perhaps for want of memory: give the job more, or fewer cores"
            raise UserError(message, remedy) from None
        if isinstance(said, _Failed):
            if said.remedy is not None:
                raise UserError(said.message, said.remedy)
            raise RuntimeError(f"in a process that worked on the rows:\n{said.message}")
        return said


def _serve(line: Connection, work: Callable[[Any], Any], parent: int) -> None:
    """What each process does: take pieces and give results, until there are no more."""
    # A process whose parent was killed in between must not live on alone.
    if not sidecar.keep_to(parent):
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core has a process of its own
    while True:
        try:
            piece = line.recv()
        except EOFError:
            return
        try:
            said = work(piece)
        except UserError as error:
            said = _Failed(error.message, error.remedy)
        except Exception:  # noqa: BLE001 the outermost frame of this process: the other side raises it
            said = _Failed(traceback.format_exc())
        line.send(said)
