"""How far a stage has come: with its rows before its first step, and with its steps by its metrics.jsonl."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import cast

from msgspec import Struct

from ftlaunch.run.files import decode_line, read_json
from ftlaunch.run.records import StepMetrics
from ftlaunch.run.tail import Tail

WINDOW = 32
"""Optimizer steps, the newest ones, that the time left is judged by."""

TAIL_BYTES = 1 << 16
"""End of a metrics.jsonl that holds more than a window of entries."""

Entry = StepMetrics
"""One object of metrics.jsonl."""


class MetricsTail:
    """New entries of a metrics.jsonl that were written at or after a moment (unix seconds)."""

    def __init__(self, path: Path, since: float = 0.0) -> None:
        self._tail = Tail(path)
        self._since = since

    def read(self) -> list[Entry]:
        """Entries added since the last call."""
        entries = [entry for line in self._tail.read() if (entry := _parse(line)) is not None]
        # An entry without a time always counts.
        return [entry for entry in entries if entry.get("time", self._since) >= self._since]


def _parse(line: str) -> Entry | None:
    """The entry of a line; None for one that a crash cut short, which the next attempt then wrote on."""
    try:
        value = decode_line(line)
    except ValueError:
        return None
    return cast(Entry, value) if isinstance(value, dict) else None


def is_evaluation(entry: Entry) -> bool:
    """Return whether a line of metrics.jsonl is of an evaluation: those of optimizer steps have a loss."""
    # The key decides and not its value: a step that was left out has loss = null.
    return "loss" not in entry


def seconds_left(entries: Sequence[Entry]) -> float | None:
    """Time that the remaining steps will take at the median pace of the newest ones; None while that is unknown.

    The median leaves out pauses: evaluations, checkpoints and the gap between two attempts.
    """
    steps = [entry for entry in entries if not is_evaluation(entry) and "time" in entry][-WINDOW:]
    paces = [
        (after["time"] - before["time"]) / (after["step"] - before["step"])
        for before, after in pairwise(steps)
        # A resumed attempt repeats the steps since its checkpoint, so the step number may fall.
        if after["step"] > before["step"]
    ]
    if not paces or "steps" not in steps[-1]:
        return None
    return median(paces) * (steps[-1]["steps"] - steps[-1]["step"])


def all_entries(path: Path) -> list[Entry]:
    """Every entry of a metrics.jsonl in order, torn lines left out; of a step that is there twice, the later counts.

    An evaluation of a step is another entry than the step itself.
    """
    if not path.exists():
        return []
    with path.open(errors="replace") as file:
        entries = [entry for line in file if (entry := _parse(line)) is not None and "step" in entry]
    # In a dict a repeated key keeps its first place and takes the last value: steps stay in order.
    return list({(entry["step"], is_evaluation(entry)): entry for entry in entries}.values())


def newest(path: Path) -> list[Entry]:
    """The last entries of a metrics.jsonl, enough to judge the pace; empty where there are none."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    # The seek mostly ends within a line; what is left of that is no JSON object and is dropped.
    return [entry for line in lines if (entry := _parse(line.decode(errors="replace"))) is not None]


class Preparing(Struct, frozen=True, kw_only=True):
    """What `preparing.json` holds while rows are tokenized."""

    data: str
    """The data set's path."""
    rows: int
    """Tokenized so far."""
    rows_per_second: float

    def describe(self) -> str:
        """One line: `tokenizing facts.jsonl: 123,904 rows, 4,120 a second`."""
        return f"tokenizing {Path(self.data).name}: {self.rows:,} rows, {self.rows_per_second:,.0f} a second"


def read_preparing(path: Path) -> Preparing | None:
    """What a stage is at before its first step; None where it is at nothing that it tells of."""
    return read_json(path, Preparing)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe(entry: Entry, left: float | None) -> str:
    """One entry in one line: `step 20/200  loss 2.1034  1,203 tokens/s  0:12 left`."""
    total = f"/{entry['steps']}" if "steps" in entry else ""
    parts = [f"step {entry.get('step', '?')}{total}"]
    if is_evaluation(entry):
        return "  ".join([*parts, *(f"{key} {value:.4g}" for key, value in entry.items() if key.startswith("eval/"))])
    loss = entry.get("loss")
    parts.append(
        "left out: loss or gradient is not finite" if entry.get("skipped") or loss is None else f"loss {loss:.4f}"
    )
    if "tokens_per_second" in entry:
        parts.append(f"{entry['tokens_per_second']:,.0f} tokens/s")
    if left is not None:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)
