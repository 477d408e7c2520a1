"""The process that writes one rank's checkpoints while the rank trains: `python -m fttrain.checkpoint.writer`.

It is told what to do by lines of JSON on stdin and answers each with one on stdout. The bytes to write lie in memory
that it shares with the rank. It ends with its rank, whatever ends that. Standard library only.
"""

import hashlib
import json
import mmap
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftlaunch.run.files import sync
from fttrain.checkpoint import manifest, pieces
from fttrain.distributed import sidecar

NICENESS = 10
"""Training goes first; a rank that waits for its save leaves the processor to it."""


@dataclass
class Known:
    """What need not be found out twice."""

    good: set[str] = field(default_factory=set[str])
    """Checkpoints that have verified."""
    layout: str = ""
    """A digest of the headers of the shards that `index` describes."""
    index: bytes = b""


def main() -> None:
    """Obey one order after another until the rank closes the pipe."""
    image, rank_pid = int(sys.argv[1]), int(sys.argv[2])
    if not sidecar.keep_to(rank_pid):
        return
    os.nice(NICENESS)
    known = Known()
    for line in sys.stdin:
        try:
            answer = _obey(json.loads(line), image, known)
        except OSError as error:
            answer = {"error": _describe(error)}
        print(json.dumps(answer), flush=True)


def _describe(error: OSError) -> str:
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


def _obey(order: dict[str, Any], image: int, known: Known) -> dict[str, Any]:
    final = Path(order["folder"])
    match order["do"]:
        case "write":
            return write(manifest.temporary_path(final) / order["file"], image, order["bytes"])
        case "commit":
            known.good |= {final.name, *order["good"]}
            _add_index(manifest.temporary_path(final), order["manifest"]["files"], order["layouts"], known)
            commit(final, order["manifest"])
            return {"unpruned": prune(final.parent, order["keep"], order["best"], known.good)}
        case other:
            raise AssertionError(other)


def _add_index(folder: Path, files: dict[str, manifest.FileDigest], layouts: list[str], known: Known) -> None:
    """Write the index of the shards, which are in order of rank, and add it to the manifest's files.

    It is made from the shards' headers, once for all saves of an attempt: their layout stays the same.
    """
    layout = " ".join(layouts)
    if layout != known.layout:
        known.index = pieces.index_of(pieces.of_shard(folder / name) for name in files).render()
        known.layout = layout
    path = folder / pieces.FILE
    _write_durably(path, known.index)
    files[pieces.FILE] = manifest.seal(path)


def write(path: Path, image: int, size: int) -> dict[str, Any]:
    """Put the image's first `size` bytes into a file, flush it and read it back; return its digest and its layout."""
    for folder in (path.parent.parent, path.parent):  # not the stage's own: if somebody removed that, the save fails
        folder.mkdir(mode=0o700, exist_ok=True)
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        with mmap.mmap(image, size, prot=mmap.PROT_READ) as memory, memoryview(memory) as view:
            layout = _layout(view)
            for start in range(0, size, manifest.BLOCK):
                with view[start : start + manifest.BLOCK] as block:
                    digest.update(block)
                    file.write(block)
        file.flush()
        os.fsync(descriptor)
    # Some file systems report a full disk or a failed write only when the file is read again.
    meant = {"bytes": size, "sha256": digest.hexdigest()}
    if manifest.seal(path) != meant:
        raise OSError(f"{path.name} does not read back as it was written")
    return {"seal": meant, "layout": layout}


def _layout(shard: memoryview) -> str:
    """A digest of a shard's header."""
    end = 8 + int.from_bytes(shard[:8], "little")
    return hashlib.sha256(shard[:end]).hexdigest()


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def commit(final: Path, content: dict[str, Any]) -> None:
    """Write the manifest, flush it and give the folder its real name, in place of a bad one of the same step."""
    # The order is what makes a crash harmless: shards are on disk already, then the manifest, then the folder's list
    # of files, then the rename, then the parent's list of folders. At any point there is a whole checkpoint or none.
    temporary = manifest.temporary_path(final)
    _write_durably(temporary / manifest.FILE, manifest.render(content).encode())
    sync(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync(final.parent)


def prune(folder: Path, keep: int, best: int | None, good: set[str]) -> str | None:
    """Delete checkpoints that are no longer kept; return why something could not be deleted, or None.

    A checkpoint is verified once, and counts as good from then on.
    """

    def is_good(path: Path) -> bool:
        if path.name not in good and manifest.verify(path) is None:
            good.add(path.name)
        return path.name in good

    try:
        for path in manifest.surplus(folder, keep=keep, best=best, is_good=is_good):
            shutil.rmtree(path)
    except OSError as error:
        return _describe(error)
    return None


if __name__ == "__main__":
    main()
