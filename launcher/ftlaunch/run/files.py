"""Writing files of a run so that a reader sees them whole or not at all, and reading those that grow."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec


def temporary_path(path: Path) -> Path:
    """A hidden name beside a path that nobody else takes, on another node or in another container either."""
    return path.with_name(f".{path.name}.{os.urandom(8).hex()}")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file that a reader sees whole or not at all, and that survives a crash once this returns."""
    data = content.encode() if isinstance(content, str) else content
    aside = temporary_path(path)
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a value, structs included, as readable JSON by rename."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def write_first(path: Path, value: Any) -> bool:
    """`write_json`, unless somebody else has written the file already; returns whether nobody had."""
    aside = temporary_path(path)
    aside.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    finally:
        aside.unlink()
    return True


def sync_folder(path: Path) -> None:
    """Flush a folder's entries, so that renames in it survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def last_lines(path: Path, count: int = 20) -> str:
    """The last lines of a text, which may be long; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 200 * count))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-count:])
    except OSError:
        return ""


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file with one a line; a last line still being written is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield _decoded(line)


def _decoded(line: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(line)
    except msgspec.DecodeError:
        return json.loads(line)  # it reads NaN, and is several times as slow


def lines_from_end(file: BinaryIO, block: int = 1 << 16) -> Iterator[tuple[int, bytes]]:
    """Each line of a file, the last one first, without its end, and the offset where that is.

    What follows the last line end, empty or not, comes first.
    """
    start = end = file.seek(0, os.SEEK_END)
    rest = b""
    while start:
        size = min(block, start)
        start -= size
        file.seek(start)
        rest = file.read(size) + rest
        first, *lines = rest.split(b"\n")
        for line in reversed(lines):
            yield end, line
            end -= len(line) + 1
        rest = first
    yield end, rest
