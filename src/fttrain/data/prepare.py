"""Preparing data sets before a stage's first step: one rank of a node works, and the others wait as long as it takes.

They wait in rounds, each a short collective: so no collective times out, all learn of a stop request at once, and the
launcher sees signs of life.
"""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.run.files import write_json
from ftlaunch.run.progress import Preparing
from fttrain.data import tokens
from fttrain.distributed.stop_request import StoppedEarly
from fttrain.distributed.world import World

ROUND_SECONDS = 0.25
LOG_SECONDS = 10.0


class _Interrupted(Exception):
    """The work ends because the ranks have been asked to stop."""


class Work:
    """Data sets that this process makes ready in a thread of its own, or has nothing to do with."""

    def __init__(self, datas: Sequence[Data], tokenizer: Any, cache: Path) -> None:
        self.keys: list[tokens.Keys] = []
        self.done = 0
        """Rows of the data set that it is at."""
        self.at = datas[0].path
        self.error: BaseException | None = None
        self.stop = threading.Event()
        """Set where the work is to end."""
        self._thread = threading.Thread(target=self._run, args=(datas, tokenizer, cache), daemon=True)
        self._thread.start()

    def _run(self, datas: Sequence[Data], tokenizer: Any, cache: Path) -> None:
        try:
            for data in datas:
                self.at, self.done = data.path, 0
                self.keys.append(tokens.prepare(data, tokenizer, cache, self._note_progress))
        except BaseException as error:  # noqa: BLE001 it is raised where the ranks are waited for
            self.error = error

    def _note_progress(self, rows: int) -> None:
        self.done = rows
        if self.stop.is_set():
            raise _Interrupted

    def raise_mistake(self) -> None:
        """Raise what has ended the work, unless it is the user's to mend or was asked for: then all ranks raise it."""
        if self.error is not None and not isinstance(self.error, UserError | _Interrupted):
            raise self.error

    def is_over(self, seconds: float) -> bool:
        """Whether it has ended, waiting for it for so long."""
        self._thread.join(seconds)
        return not self._thread.is_alive()


def prepare(
    datas: Sequence[Data],
    tokenizer: Any,
    cache: Path,
    world: World,
    asked: Callable[[], str | None] = lambda: None,
    progress: Path | None = None,
) -> list[tokens.Keys]:
    """The keys under which the cache of each node has the data sets. Collective.

    Rank 0 makes them first; then one rank of every other node, which finds them where they share a disk. `asked` says
    why this rank is to stop, `progress` is a file that tells how far the work is. Raises Stopped on all ranks, and
    UserError where rows cannot be trained on or nodes have different ones.
    """
    keys: list[tokens.Keys] = []
    for is_mine in (world.is_main, world.local_rank == 0 and not world.is_main):
        work = Work(datas, tokenizer, cache) if is_mine else None
        _wait_for(work, world, asked, _Teller(progress if world.is_main else None))
        keys = work.keys if work else keys
        if world.size == 1:
            break
    return _agreed(keys, world)


def _wait_for(work: Work | None, world: World, asked: Callable[[], str | None], teller: "_Teller") -> None:
    """Wait until no rank works any more, and raise together what any of them has met."""
    is_stopping = False
    while True:
        # The work runs in a thread, so that its rank can take part in the rounds.
        is_over = work is None or work.is_over(ROUND_SECONDS)
        if work is None and world.size > 1:
            time.sleep(ROUND_SECONDS / 10)
        if work is not None:
            work.raise_mistake()
        busy, stopping = world.sum([float(not is_over), float(asked() is not None)])
        is_stopping = is_stopping or bool(stopping)
        if work is not None:
            if is_stopping:
                work.stop.set()
            teller.tell(work)
        if not busy:
            break
    teller.end()
    _raise_together(work, world, asked, is_stopping=is_stopping)


def _raise_together(work: Work | None, world: World, asked: Callable[[], str | None], *, is_stopping: bool) -> None:
    error = work.error if work is not None and isinstance(work.error, UserError) else None
    said = world.gather((error and (error.message, error.remedy), asked() if is_stopping else None))
    if error is not None:
        raise error
    if failed := next((one for one, _ in said if one), None):
        raise UserError(*failed)
    if is_stopping:
        raise StoppedEarly(next((reason for _, reason in said if reason), "asked"), 0)


def _agreed(keys: list[tokens.Keys], world: World) -> list[tokens.Keys]:
    """Return rank 0's keys. Raises UserError where another node has other rows under the same name."""
    for rank, others in enumerate(world.gather(keys)):
        if rank == 0:
            keys = others
        if others and others != keys:
            host = world.peers[rank][0] if world.peers else f"rank {rank}"
            message = f"{host} has other rows, or another tokenizer, than the first node under the same path"
            raise UserError(message, "put the same files on all nodes, or on a file system that they share")
    return keys


class _Teller:
    """Tells how far the work is: in a file for `status`, and in the log."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._began = self._logged = time.monotonic()
        self._last_done = 0

    def tell(self, work: Work) -> None:
        now = time.monotonic()
        if work.done == self._last_done:
            return
        self._last_done = work.done
        preparing = Preparing(data=work.at, rows=work.done, rows_per_second=work.done / (now - self._began))
        if self._path is not None:
            with suppress(OSError):  # a failing disk is reported by whoever writes checkpoints; progress is a courtesy
                write_json(self._path, preparing)
        if now - self._logged > LOG_SECONDS:
            self._logged = now
            print(preparing.describe(), file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
