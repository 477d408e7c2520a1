"""SHA-256 of files, taken once: kept for as long as a file's size, place and times say that it is the same."""

import contextlib
import hashlib
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec import Struct

from ftlaunch.run.files import cache_folder, read_if_sound, write_atomic

THREADS = 4
"""Files that are read at the same time: hashing leaves the interpreter's lock."""
RECENT_SECONDS = 2.0
"""A file that was changed so recently might be changed again without its times telling."""


class _Kept(Struct, frozen=True):
    """What is kept of a file."""

    identity: tuple[int, ...]
    sha256: str


def sha256(path: Path) -> str:
    """The digest of a file's content."""
    path = path.resolve()
    identity = _identity(path)
    place = _place(path)
    # A torn entry, or one of another version, only costs another reading of the file.
    if (kept := read_if_sound(place, _Kept)) and kept.identity == identity:
        return kept.sha256
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    changed = max(path.stat().st_mtime, path.stat().st_ctime)
    # Of a file that was written to while it was read, the digest is of neither version: it is not kept.
    if _identity(path) == identity and time.time() - changed > RECENT_SECONDS:
        with contextlib.suppress(OSError):  # a home that cannot be written costs time and nothing else
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic(place, msgspec.json.encode(_Kept(identity, digest)))
    return digest


def is_kept(path: Path) -> bool:
    """Whether the digest of a file as it is now is known without reading it."""
    path = path.resolve()
    kept = read_if_sound(_place(path), _Kept)
    return kept is not None and kept.identity == _identity(path)


def sha256_of(paths: Iterable[Path]) -> dict[str, str]:
    """The digest of each file, by its path."""
    paths = list(paths)
    from concurrent.futures import ThreadPoolExecutor  # slow to import, and mostly all digests are kept

    with ThreadPoolExecutor(THREADS) as threads:
        return dict(zip(map(str, paths), threads.map(sha256, paths), strict=True))


def _place(path: Path) -> Path:
    # A path itself has slashes and may be too long for a file name.
    return cache_folder("digests") / hashlib.sha256(str(path).encode()).hexdigest()


def _identity(path: Path) -> tuple[int, ...]:
    """What changes with a file's content, without its device: that has other numbers on other nodes."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
