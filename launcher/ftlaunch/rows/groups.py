"""Rows that stand next to each other, each with one answer to the same prompt, as one row with these answers."""

from collections.abc import Iterable, Iterator
from itertools import groupby

from ftlaunch.recipe import Data
from ftlaunch.rows.template import DataError, Row, present


def grouped(data: Data, rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    """Return the rows as they are, or one for each run of them that has the same in the field `data.group_by`.

    It is the first of them, and all of them are its answers. Raises DataError where a row lacks the field.
    """
    if (field := data.group_by) is None:
        return iter(rows)

    def by(found: tuple[str, Row]) -> object:
        where, row = found
        if field not in row:
            raise DataError(
                where, f"field {field}, by which rows are grouped, is missing", f"the row has {present(row, row)}"
            )
        return row[field]

    runs = (list(run) for _, run in groupby(rows, key=by))
    return ((run[0][0], {**run[0][1], data.answers_field: [row for _, row in run]}) for run in runs)
