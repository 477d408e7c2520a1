"""Rows that stand next to each other, each with one answer to the same prompt, as one row with these answers."""

import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from hashlib import blake2b
from itertools import groupby

from ftlaunch.recipe.data import Data
from ftlaunch.rows.template import DataError, Misread, Row, present

APART = (
    "sort the file: python -c \"import pandas as p; p.read_json('FILE', lines=True)"
    ".sort_values('{0}', kind='stable').to_json('NEW', orient='records', lines=True, force_ascii=False)\""
)


def grouped(data: Data, rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    """Return the rows as they are, or one for each run of them that has the same in the field `data.group_by`.

    It is the first of them, and all of them are its answers. A later run with the same there is unfit. Raises DataError
    where a row lacks the field.
    """
    return iter(rows) if data.group_by is None else _runs(data, data.group_by, rows)


def _runs(data: Data, field: str, rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    def by(found: tuple[str, Row]) -> object:
        where, row = found
        if field not in row:
            raise DataError(
                where, f"field {field}, by which rows are grouped, is missing", f"the row has {present(row, row)}"
            )
        return row[field]

    with closing(_Seen()) as seen:
        for value, run in groupby(rows, key=by):
            (where, first), *others = run
            answers = [first, *(row for _, row in others)]
            joined = {**first, data.answers_field: answers}
            if (misread := next((row for row in answers if isinstance(row, Misread)), None)) is not None:
                joined = Misread(joined, misread.problem, misread.remedy)
            elif not seen.add(value):
                problem = f"other rows with the same {field} stand further up, not next to it"
                joined = Misread(joined, problem, APART.format(field))
            yield where, joined


class _Seen:
    """Values that have come, as digests in a temporary file: memory does not grow with their number."""

    def __init__(self) -> None:
        import sqlite3  # few tables group their rows

        # "" is a database of its own that SQLite deletes. Rows may be read in another thread than the one that began.
        self._known = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._known.execute("PRAGMA synchronous = OFF")
        self._known.execute("BEGIN")
        self._known.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, value: object) -> bool:
        """Whether the value is new."""
        digest = blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).digest()
        return self._known.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1

    def close(self) -> None:
        self._known.close()
