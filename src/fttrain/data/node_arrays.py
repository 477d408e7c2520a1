"""Large arrays that the ranks of a node hold once between them: files of a folder on the node, mapped by each rank."""

import fcntl
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ftlaunch.run.files import temporary_path
from ftlaunch.run.layout import NODE_FOLDER

SHARED_FROM = 1 << 20
"""Elements. A smaller array is made by each rank for itself: that takes less than a file."""


class NodeArrays:
    """Arrays by name, each made by the rank that first asks for it while the others wait for its file.

    Without a folder, as in a process that was started by hand, every process makes its own.
    """

    def __init__(self, folder: Path | None = None, shared_from: int = SHARED_FROM) -> None:
        self._folder = folder
        self._shared_from = shared_from

    @classmethod
    def of_attempt(cls) -> "NodeArrays":
        """Those of the attempt that this process belongs to."""
        folder = os.environ.get(NODE_FOLDER)
        return cls(Path(folder) if folder else None)

    def get(self, name: str, number: int, length: int, kind: type, fill: Callable[[np.ndarray], None]) -> np.ndarray:
        """Number `number` of the arrays called `name`: [length] of `kind`, as `fill` leaves it.

        Where a number is made all others but the one before it are deleted, to be made again if they are asked for.
        """
        if self._folder is None or length < self._shared_from:
            made = np.empty(length, dtype=kind)
            fill(made)
            return made
        # The file appears by rename, so whoever sees it may map it. The lock only keeps two ranks from making it twice.
        # Ranks may be one epoch apart, so the previous array stays; those who have mapped a deleted one keep it.
        path = self._folder / f"{name}-{number}"
        if not path.exists():
            with _alone(self._folder / f"{name}.lock"):
                if not path.exists():
                    _make(path, length, kind, fill)
                    for old in self._folder.glob(f"{name}-*"):
                        if old.name not in (f"{name}-{number}", f"{name}-{number - 1}"):
                            old.unlink()
        return np.asarray(np.memmap(path, kind, "r"))


def _make(path: Path, length: int, kind: type, fill: Callable[[np.ndarray], None]) -> None:
    partial = temporary_path(path)
    try:
        memory = np.memmap(partial, kind, "w+", shape=(length,))
        fill(np.asarray(memory))
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _alone(path: Path) -> Generator[None]:
    """Hold a lock of this node; the kernel lets go of it with its holder."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def smallest_unsigned(count: int) -> type:
    """The smallest format that tells `count` things apart."""
    return next(kind for kind in (np.uint8, np.uint16, np.uint32, np.uint64) if count <= np.iinfo(kind).max + 1)
