"""Rows of data: where they are, reading them, and looking them over before a run starts."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from ftlaunch.recipe import Data
from ftlaunch.rows.fill import DataError, Row
from ftlaunch.rows.reading import Lines, data_files, is_local, read_rows, rows_of
from ftlaunch.rows.turns import check_row

__all__ = ["check_rows", "data_files", "is_local", "read_rows"]

CHECKED_ROWS: Final = 20_000
CHECKED_BYTES: Final = 64 * 2**20


@dataclass
class _Finding:
    where: str
    problem: str
    remedy: str
    count: int = 0


def check_rows(data: Data) -> list[tuple[str, str, str]]:
    """(where, message, remedy) of the first row with each kind of problem, and of what cannot be read; [] if sound.

    Reads local files up to `data.limit`, 20,000 rows or 64 MB. Parquet files, larger .json files and the hub's data
    sets are left to the trainer.
    """
    if not is_local(data.path):
        return []
    findings: dict[str, _Finding] = {}
    unreadable: list[tuple[str, str, str]] = []
    seen = 0
    try:
        for where, row in islice(_sample(data), data.limit):
            seen += 1
            _note(findings, data, row, where)
    except DataError as error:
        unreadable.append((error.where, error.problem, error.remedy))
    counted = [(f.where, f"{f.problem} (in {f.count} of {seen} rows read)", f.remedy) for f in findings.values()]
    return counted + unreadable


def _note(findings: dict[str, _Finding], data: Data, row: Row, where: str) -> None:
    try:
        check_row(data, row, where)
    except DataError as error:
        kind = re.sub(r"\[\d+\]", "[]", error.problem)
        findings.setdefault(kind, _Finding(where, error.problem, error.remedy)).count += 1


def _sample(data: Data) -> Iterator[tuple[str, Row]]:
    rows, done = 0, 0
    for path in data_files(Path(data.path)):
        size = path.stat().st_size
        if path.suffix == ".parquet" or (path.suffix == ".json" and size > CHECKED_BYTES):
            continue
        lines = Lines(path)
        for row in rows_of(lines):
            yield row
            rows += 1
            if rows == CHECKED_ROWS or done + lines.position > CHECKED_BYTES:
                return
        done += size
