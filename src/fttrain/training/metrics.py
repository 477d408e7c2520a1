"""metrics.jsonl: one object per optimizer step, each step exactly once, however often the run was resumed."""

import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftlaunch.errors import UserError
from ftlaunch.run.files import lines_from_end, write_json

log = logging.getLogger(__name__)


class MetricsLog:
    """Appends to a step's metrics file; only the main rank writes."""

    def __init__(self, path: Path, *, is_main: bool, last_step: int) -> None:
        """Keep the lines up to `last_step`, the step of the checkpoint that training goes on from.

        Raises UserError where the disk does not let it.
        """
        self._path = path
        self._is_main = is_main
        self._unwritten = ""
        self.also: Callable[[dict[str, Any]], None] | None = None
        """A function that gets each line as well, on the main rank."""
        if is_main and path.exists():
            try:
                _cut_after(path, last_step)
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error.strerror}", "make room or mend the disk") from error

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add one line and flush it, so that readers see it at once. What a full disk refuses is written later.

        Raises UserError where the folder is gone.
        """
        if not self._is_main:
            return
        if not self._path.parent.is_dir():
            raise UserError(f"{self._path.parent} is gone", "a run cannot go on without its folder; start it again")
        line = {"step": step, **values, "time": time.time()}
        self._unwritten += json.dumps(line) + "\n"
        try:
            self._append()
        except OSError as error:
            log.warning("metrics of step %d are kept for later: %s", step, error)
        if self.also is not None:
            self.also(line)

    def _append(self) -> None:
        """Write all pending lines, or none of them."""
        # Unbuffered, so that one write either has all bytes on the way or is undone: half a line would never be mended.
        with self._path.open("ab", buffering=0) as file:
            before = file.tell()
            lines = self._unwritten.encode()
            try:
                if file.write(lines) != len(lines):
                    raise OSError("the disk took only a part")
            except OSError:
                file.truncate(before)
                raise
        self._unwritten = ""


def keep(path: Path, content: Any, what: str) -> None:
    """Write down what training can do without. A disk that does not let it is no reason to end training."""
    try:
        write_json(path, content)
    except OSError as error:
        log.warning("%s not kept in %s: %s", what, path, error)


def _cut_after(path: Path, last_step: int) -> None:
    """Cut a metrics file off after the lines of a step. Lines are in order of steps, so only what goes is read."""
    with path.open("r+b") as file:
        lines = lines_from_end(file)
        next(lines)  # what follows the last line end was never finished
        ends = (end + 1 for end, line in lines if _step_of(line) <= last_step)
        file.truncate(next(ends, 0))
        os.fsync(file.fileno())


def _step_of(line: bytes) -> float:
    """Return a line's step; infinity for a line that cannot be read, such as one that a crash cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
