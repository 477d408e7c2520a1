"""Writing files of a run so that a reader sees them whole or not at all, and reading those that grow."""

import json
import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from ftlaunch.errors import UserError

T = TypeVar("T")


def cache_folder(name: str) -> Path:
    """~/.cache/ftlaunch/NAME, unless XDG_CACHE_HOME says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ftlaunch" / name


def unwritable_cache(folder: Path, error: OSError) -> UserError:
    """What to say where tokens cannot be kept in a folder."""
    message = f"tokens cannot be kept in {folder}: {error.strerror}"
    return UserError(message, "set XDG_CACHE_HOME to a folder that can be written, such as one on scratch")


def require_cache() -> None:
    """UserError where no tokens can be kept: found out by making a file, as root may write in any folder but some."""
    import tempfile

    folder = cache_folder("tokens")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise unwritable_cache(folder, error) from error


def temporary_path(path: Path) -> Path:
    """A hidden name next to a path that nobody else takes, not even on another node or in another container."""
    return path.with_name(f".{path.name}.{os.urandom(8).hex()}")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file that a reader sees whole or not at all, and that survives a crash once this returns."""
    with file_by_rename(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def file_by_rename(path: Path, *, durable: bool = True) -> Generator[BinaryIO]:
    """A file to write, which takes the place of `path` once it is whole; if `durable`, it then survives a power cut."""
    partial = temporary_path(path)
    try:
        with partial.open("wb") as file:
            yield file
            if durable:
                # Both before the rename: a power cut could otherwise keep the new name and lose the content.
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if durable:
        # The new name is an entry of the folder and safe only once the folder itself is flushed.
        sync(path.parent)


@contextmanager
def folder_by_rename(path: Path, *, durable: bool = True) -> Generator[Path]:
    """A new folder to fill, which becomes `path` once it is whole; if `durable`, it then survives a power cut.

    OSError where `path` is there by then and holds anything: who replaces a folder removes the old one last. What an
    attempt that was killed has left is removed.
    """
    # A fixed name, unlike a file's: what a killed attempt left is found by it.
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700, parents=True)
    try:
        yield partial
        for inner in partial.rglob("*") if durable else ():
            sync(inner)
        # rename(2) replaces an empty folder and fails on any other, so no file is ever overwritten.
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if durable:
        sync(path.parent)


def require_empty(folder: Path) -> None:
    """UserError where a folder that is to be written holds anything."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty", "name another folder, or remove it")


def write_json(path: Path, value: Any) -> None:
    """Write a value, structs included, as readable JSON by rename."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def read_json(path: Path, kind: type[T]) -> T | None:
    """What a file holds; None where there is no such file. msgspec.DecodeError where it holds something else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None


def read_if_sound(path: Path, kind: type[T]) -> T | None:
    """What a file holds; None where that cannot be read, or is something else, such as another version's."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError):
        return None


def write_first(path: Path, value: Any) -> bool:
    """`write_json`, unless somebody else has written the file already; returns whether nobody had."""
    partial = temporary_path(path)
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
    try:
        # A link fails where the name is taken; a rename would replace what somebody else wrote.
        os.link(partial, path)
    except FileExistsError:
        return False
    finally:
        partial.unlink()
    return True


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, so that what was written, or renamed in it, survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def why_unwritable(folder: Path) -> str | None:
    """Why nothing can be written into a folder, as on a full disk or with a quota used up; None where it can.

    None as well for those who may not write there: what they cannot do says nothing about whoever wrote there before.
    """
    try:
        import tempfile

        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())  # file servers tell of a quota no earlier
    except PermissionError:
        return None
    except OSError as error:
        return error.strerror
    return None


def last_lines(path: Path, count: int = 20) -> str:
    """The last lines of a text, which may be long; empty where there is none."""
    try:
        with path.open("rb") as file:
            # About 200 bytes a line, so that a log of gigabytes is not read whole.
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
                yield decode_line(line)


def decode_line(line: bytes | str) -> Any:
    """A line of JSON, in which a number may be NaN. ValueError where it is none."""
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
        # It may be the end of a line that begins in the block before.
        rest = first
    yield end, rest
