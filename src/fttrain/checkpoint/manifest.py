"""What makes a folder a checkpoint: a manifest, written last, with the size and SHA-256 of every file.

Standard library only: the process that writes checkpoints starts in milliseconds.
"""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FORMAT = 2
FILE = "manifest.json"
BLOCK = 1 << 23
"""Bytes that are read, hashed or written at once."""
THREADS = 4
"""Files that one process verifies at the same time; hashing releases the interpreter's lock."""

FileDigest = dict[str, Any]
"""`bytes` and `sha256` of a file."""


def folder_name(step: int) -> str:
    """Return the name of the checkpoint of an optimizer step; names sort as steps do."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the optimizer step of a checkpoint folder."""
    return int(path.name.removeprefix("step-"))


def temporary_path(final: Path) -> Path:
    """Where a checkpoint is while it is made."""
    return final.with_name(f".{final.name}.partial")


def render(manifest: dict[str, Any]) -> str:
    """The text of a manifest, with its own digest as the last key."""
    # The digest covers the text without itself, so that `read` can take the key out, render again and compare bytes.
    text = json.dumps(manifest, indent=2)
    return json.dumps({**manifest, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=2)


def seal(path: Path) -> FileDigest:
    """Size and digest of a file as the disk has it."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        # The page cache would answer with what was written rather than with what the disk holds.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def verify(folder: Path, *, share: int = 0, of: int = 1) -> str | None:
    """Return what is wrong with a checkpoint folder; None where every file has the manifest's size and digest.

    Several processes can share the work: process `share` of `of` looks at its part of the files.
    """
    try:
        manifest = read(folder)
        # Shards are of like size, so every `of`-th file gives each process about the same number of bytes to hash.
        files = sorted(manifest["files"].items())[share::of]
        with ThreadPoolExecutor(THREADS) as threads:
            problems = threads.map(lambda item: _file_problem(folder / item[0], item[1]), files)
            return next(filter(None, problems), None)
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except _Wrong as error:
        return str(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read: {error}"


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, once it is known to be as it was written."""
    text = (folder / FILE).read_text()
    manifest = json.loads(text)
    if manifest["format"] != FORMAT:
        raise _Wrong(f"format {manifest['format']} is not {FORMAT}")
    del manifest["sha256"]
    if text != render(manifest):  # to the byte: another spelling of the same content would be damage, too
        raise _Wrong(f"{FILE} does not match its own SHA-256")
    return manifest


class _Wrong(Exception):
    """A manifest that can be read, and says that the checkpoint is of no use."""


def _file_problem(path: Path, expected: FileDigest) -> str | None:
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{path.name} has {size} bytes, the manifest says {expected['bytes']}"
    return None if seal(path) == expected else f"{path.name} does not match its SHA-256"


def newest_first(folder: Path) -> list[Path]:
    """Folders of finished saves, whether good or not."""
    return sorted(folder.glob("step-*"), key=step_of, reverse=True)


def surplus(folder: Path, *, keep: int, best: int | None, is_good: Callable[[Path], bool]) -> list[Path]:
    """Return what may be deleted: all but the `keep` newest good checkpoints and that of step `best`."""
    # A bad one does not count as kept: else `keep` torn checkpoints in a row would delete the last good one. And it
    # is only verified while good ones are still to be found, because that reads the whole folder.
    good, rest = 0, []
    for path in newest_first(folder):
        if good < keep:
            good += is_good(path)
        elif step_of(path) != best:
            rest.append(path)
    return rest
