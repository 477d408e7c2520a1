"""A set of tokens on its way to disk: written block by block, resumed after a kill, and put in place as a whole."""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ftlaunch.errors import UserError
from ftlaunch.run.files import read_json, temporary_path, unwritable_cache, write_json
from ftlaunch.run.records import Counts
from fttrain.data.chat import Encoded, EncodedPair
from fttrain.data.token_set import MARGINS, OFFSETS, Meta, PairSet, TokenSet, open_folder, places, supervised

KEEP_SECONDS = 5.0
"""Between two times that it is noted how far a set has come."""
ABANDONED_SECONDS = 60.0
"""A set of which nothing has been noted for so long is nobody's."""
WAIT_SECONDS = 0.2
KEPT = "kept.json"
CHUNK = 1 << 20
"""Rows whose places are worked out at once."""


class Block(NamedTuple):
    """Some rows or pairs as the bytes that a set's files have of them."""

    ids: bytes
    trained: bytes
    lengths: bytes
    supervised: bytes
    margins: bytes


def block_of(made: Sequence[Encoded | EncodedPair]) -> Block:
    """Rows, or pairs, as a block."""
    rows = [row for one in made for row in ((one.chosen, one.rejected) if isinstance(one, EncodedPair) else (one,))]
    margins = [one.margin for one in made if isinstance(one, EncodedPair)]
    return Block(
        ids=np.array([token for row in rows for token in row.ids_T], dtype=np.int32).tobytes(),
        trained=b"".join(bytes(row.trained_T) for row in rows),
        lengths=np.array([len(row.ids_T) for row in rows], dtype=np.int64).tobytes(),
        supervised=np.array([supervised(row) for row in rows], dtype=np.int64).tobytes(),
        margins=np.array(margins, dtype=np.float32).tobytes(),
    )


class Making:
    """The set that is to be in a folder. It is in another until it is whole, open to its owner only."""

    def __init__(self, folder: Path, partial: Path) -> None:
        """Go on with what another process has kept in `partial`, if there is any."""
        self._folder = folder
        self._partial = partial
        self._partial.mkdir(parents=True, exist_ok=True, mode=0o700)
        noted = read_json(self._partial / KEPT, dict[str, Any])
        self.kept: dict[str, Any] | None = noted["state"] if noted else None
        """What `keep` was last told."""
        self._files = {name: self._open(name, noted["sizes"][name] if noted else 0) for name in Block._fields}
        self._noted_at = time.monotonic()

    def _open(self, name: str, size: int) -> Any:
        descriptor = os.open(self._partial / name, os.O_RDWR | os.O_CREAT, 0o600)
        file = os.fdopen(descriptor, "r+b")
        file.seek(size)
        return file

    def add(self, block: Block) -> None:
        for name, data in zip(Block._fields, block, strict=True):
            self._files[name].write(data)

    def keep(self, state: Callable[[], dict[str, Any]], *, now: bool = False) -> None:
        """Note how far the set has come, now and then or `now`, with the state of whoever makes it."""
        if not now and time.monotonic() - self._noted_at < KEEP_SECONDS:
            return
        self._noted_at = time.monotonic()
        for file in self._files.values():
            file.flush()
        # Without fsync: after a power cut the sizes may promise lost bytes. `open_folder` compares sizes, and a broken
        # set is made again.
        sizes = {name: file.tell() for name, file in self._files.items()}
        with contextlib.suppress(FileNotFoundError):  # another node has taken it over, or somebody has removed it
            write_json(self._partial / KEPT, {"sizes": sizes, "state": state()})

    def publish(self, counts: Counts) -> tuple[TokenSet | PairSet, Counts]:
        """Put the set in place and open it. UserError if all that is there is broken."""
        sizes: dict[str, int] = {}
        for name, file in self._files.items():
            sizes[name] = file.tell()
            file.truncate()
            file.close()
        if not sizes[MARGINS]:
            del sizes[MARGINS]
        with contextlib.suppress(FileNotFoundError):  # another node has taken it over
            sizes[OFFSETS] = _write_offsets(self._partial)
            write_json(self._partial / "meta.json", Meta(counts=counts, sizes=sizes))
            for name in {MARGINS, KEPT} - sizes.keys():
                (self._partial / name).unlink(missing_ok=True)
        try:
            return _put_in_place(self._partial, self._folder)
        finally:
            self.discard()

    def discard(self) -> None:
        """Delete the unfinished set."""
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._partial, ignore_errors=True)


def _write_offsets(folder: Path) -> int:
    """Write where each row begins, which is told by the lengths of those before it; the file's size."""
    begin = 0
    with (folder / "lengths").open("rb") as lengths, (folder / OFFSETS).open("wb") as offsets:
        while len(part := np.fromfile(lengths, dtype=np.int64, count=CHUNK)):
            ends = begin + np.cumsum(part)
            (ends - part).tofile(offsets)
            begin = int(ends[-1])
        return offsets.tell()


def _put_in_place(partial: Path, folder: Path) -> tuple[TokenSet | PairSet, Counts]:
    """Rename `partial` to `folder`, unless another process has just put the same there."""
    for place in places(folder):
        try:
            partial.rename(place)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT):
                raise
        if found := open_folder(place):
            return found
    raise UserError(f"the cached tokens in {folder} and next to it are all broken", "mend the disk, and remove them")


@contextmanager
def alone(folder: Path, tick: Callable[[], None]) -> Generator[Path]:
    """The folder in which to make a set, while no other process of this node does; `tick` is called while one does.

    What another node has left there is taken over. Several nodes may be at it: that costs time and nothing else.
    Raises UserError where nothing can be written there.
    """
    partial = folder.with_name(f".making-{folder.name}-{socket.gethostname()}")
    lock = partial.with_name(f"{partial.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, is_locked = _locked(lock, tick)
    except OSError as error:
        raise unwritable_cache(folder.parent, error) from error
    try:
        if is_locked:
            _take_over(folder, partial, descriptor)
        yield partial if is_locked else temporary_path(partial)
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path, tick: Callable[[], None]) -> tuple[int, bool]:
    """The lock file, and whether it is locked: there are file systems that know no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            tick()
            time.sleep(WAIT_SECONDS)
            continue
        except OSError:
            return descriptor, False
        # The holder deletes the file before it lets go: whoever waited for that file holds a lock that nobody sees.
        if _is_still(path, descriptor):
            return descriptor, True
        os.close(descriptor)  # of a holder that is done with it


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _take_over(folder: Path, partial: Path, descriptor: int) -> None:
    """Go on with what another node has left, which has not noted anything for a while.

    Should it still be at work, it writes the same bytes to the same places, and finds its folder gone.
    """
    os.utime(descriptor)
    now = os.fstat(descriptor).st_mtime  # by the clock of the file system
    for left in [] if partial.exists() else folder.parent.glob(f".making-{folder.name}-*/{KEPT}"):
        with contextlib.suppress(OSError):  # a third node was faster
            if now - left.stat().st_mtime > ABANDONED_SECONDS:
                left.parent.rename(partial)
                return
