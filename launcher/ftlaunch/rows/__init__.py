"""Rows of data: where they are, reading them, and looking them over before a run starts."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from ftlaunch.recipe import Data
from ftlaunch.rows.conversations import row_format, text_of, turns_of
from ftlaunch.rows.pairs import Unfit, pair_of
from ftlaunch.rows.prompts import prompt_of
from ftlaunch.rows.readers import Lines, data_files, is_local, read_rows, rows_of
from ftlaunch.rows.template import DataError, Row

__all__ = ["check_rows", "data_files", "is_local", "is_paired", "read_rows"]

PAIRED: Final = ("preference", "ratings")
"""Formats whose rows hold a better and a worse answer."""

CHECKED_ROWS: Final = 20_000
CHECKED_BYTES: Final = 64 * 2**20


def is_paired(data: Data) -> bool:
    """Whether rows become pairs of answers."""
    return row_format(data) in PAIRED


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
    unfit: Counter[Unfit] = Counter()
    seen = 0
    try:
        for where, row in islice(_sample(data), data.limit):
            seen += 1
            _note(findings, unfit, data, row, where)
    except DataError as error:
        unreadable.append((error.where, error.problem, error.remedy))
    if seen and unfit.total() == seen:
        reasons = ", ".join(f"{count} {reason}" for reason, count in unfit.items())
        remedy = "look at the rows: a pair has one prompt, and two answers of which one is better"
        return [(data.path, f"none of the {seen} rows read makes a pair: {reasons}", remedy)]
    counted = [(f.where, f"{f.problem} (in {f.count} of {seen} rows read)", f.remedy) for f in findings.values()]
    return counted + unreadable


def _note(findings: dict[str, _Finding], unfit: "Counter[Unfit]", data: Data, row: Row, where: str) -> None:
    try:
        if (reason := _check_row(data, row, where)) is not None:
            unfit[reason] += 1
    except DataError as error:
        kind = re.sub(r"\[\d+\]", "[]", error.problem)
        findings.setdefault(kind, _Finding(where, error.problem, error.remedy)).count += 1


def _check_row(data: Data, row: Row, where: str) -> Unfit | None:
    """Raise the DataError that training on this row would raise, the tokenizer aside; why it makes no pair, if so."""
    if is_paired(data):
        pair = pair_of(data, row, where)
        return pair if isinstance(pair, str) else None
    if row_format(data) == "prompt" and data.completion is None:
        prompt_of(data, row, where)
    elif row_format(data) == "text":
        text_of(data, row, where)
    else:
        turns_of(data, row, where)
    return None


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
