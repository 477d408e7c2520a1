"""How far a stage is with its rows before its first step: what the trainer tells of it, and the launcher shows."""

from pathlib import Path

from msgspec import Struct

from ftlaunch.run.files import read_json


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
