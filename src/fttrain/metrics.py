"""metrics.jsonl: one object an optimizer step, each step exactly once, however often the run was resumed."""

import json
import time
from pathlib import Path
from typing import Any

from ftlaunch.rundir import read_jsonl, write_atomic


class MetricsLog:
    """Appends to a step's metrics file; only the main rank writes."""

    def __init__(self, path: Path, *, is_main: bool, last_step: int) -> None:
        """Keep the lines up to `last_step`, the step of the checkpoint that training goes on from."""
        self._path = path
        self._is_main = is_main
        if is_main and path.exists():
            kept = [json.dumps(line) + "\n" for line in read_jsonl(path) if line["step"] <= last_step]
            write_atomic(path, "".join(kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add one line and flush it, so that readers see it at once."""
        if self._is_main:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **values, "time": time.time()}) + "\n")
