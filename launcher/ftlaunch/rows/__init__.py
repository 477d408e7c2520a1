"""Rows of data: where they are, reading them, and looking them over before a run starts."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

from msgspec import Struct, field
from msgspec.structs import replace

from ftlaunch.recipe.data import Data
from ftlaunch.recipe.names import is_local
from ftlaunch.rows import looks, tables
from ftlaunch.rows.columns import Columns, misspelt
from ftlaunch.rows.conversations import conversation_of, is_paired, is_text, row_format, text_of
from ftlaunch.rows.files import ENDINGS, data_files, kind_of_file, unread_files
from ftlaunch.rows.groups import grouped
from ftlaunch.rows.lines import Lines
from ftlaunch.rows.pairs import is_good, pair_of
from ftlaunch.rows.prompts import prompt_of
from ftlaunch.rows.readers import rows_of
from ftlaunch.rows.template import DataError, Row, Unfit
from ftlaunch.rows.unfit import UnfitRows, remedy, summary

# So much is read within seconds, before a run starts. The trainer checks the rows below that as it reads them.
CHECKED_ROWS: Final = 20_000
CHECKED_BYTES: Final = 64 * 2**20
NAMED: Final = 12
"""Columns or files that are named."""


def for_evaluation(data: Data) -> Data | None:
    """The data table of the rows that `eval` names; None where it names none."""
    if data.eval is None:
        return None
    # These keys are about training rows: nothing is held out of rows for evaluation, and all of them count.
    alone = replace(data, eval=None, test=0, test_by="row", limit=None)
    # Loading the recipe has made a file or folder absolute. What has no slash is a split of the same data set.
    is_path = "/" in data.eval or data.eval.endswith(ENDINGS)
    return replace(alone, path=data.eval, split="train") if is_path else replace(alone, split=data.eval)


class Findings(Struct):
    """What a look at the rows of a data set shows."""

    problems: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    """(where, message, remedy) of what would keep the data set from being trained on."""
    notes: list[str] = field(default_factory=list[str])
    """What is left out, and the first such rows by name."""


def check_rows(data: Data, *, only_prompts: bool = False) -> Findings:
    """What is wrong with the rows, of which prompts alone may be wanted, and what of them is left out.

    Reads local files up to `data.limit`, 20,000 rows or 64 MB. The hub's data sets are left to the trainer.
    """
    if not is_local(data.path):
        return Findings()
    found, unfit, sample = Findings(), UnfitRows(), _Sample(data)
    seen = 0
    fields: set[str] = set()
    columns = Columns(data)
    try:
        for where, row in islice(grouped(data, sample), data.limit):
            seen += 1
            fields |= row.keys()
            columns.note(row, where)
            # Unfit is a DataError, too: one row that is unfit is counted here, while any other DataError ends the
            # reading.
            try:
                _check_row(data, row, where, only_prompts=only_prompts)
            except Unfit as error:
                unfit.add(error)
    except DataError as error:
        found.problems.append((error.where, error.problem, error.remedy))
    if seen:
        # In front of what ended the reading: these are about earlier rows.
        found.problems[:0] = [*misspelt(data, fields), *columns.problems(), *_problems(data, unfit, seen)]
    if not found.problems:
        found.notes = [*_notes(data, unfit, seen, is_cut=sample.is_cut)]
    # A reward function is given whole rows.
    if not only_prompts and (unread := sorted(fields - looks.fields_read(data, fields))):
        found.notes.append(f"unread columns: {_named(unread)}")
    return found


def _notes(data: Data, unfit: UnfitRows, seen: int, *, is_cut: bool) -> Iterator[str]:
    if unfit.every():
        yield summary(seen, unfit.every(), unfit.examples)
    if is_cut:
        yield f"the first {seen} rows were looked at; a run looks at all of them"
    if others := [file.name for file in unread_files(Path(data.path), data.split)]:
        yield f"files that are not read: {_named(others)}"


def _named(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def settled(data: Data, *, only_prompts: bool = False) -> Data:
    """The data table with its format told by the first rows, where it leaves that open and they can be read here.

    Raises DataError where they cannot be read, or do not tell it.
    """
    if not looks.is_open(data) or not is_local(data.path):
        return data
    first = list(islice(_Sample(data), looks.LOOKED_AT))
    return looks.looked_at(data, first, only_prompts=only_prompts) if first else data


def _problems(data: Data, unfit: UnfitRows, seen: int) -> Iterator[tuple[str, str, str]]:
    if unfit.are_too_many(data, seen):
        for reason, count in unfit.unfit.most_common():
            first = unfit.firsts[reason]
            yield (
                first.where,
                f"{first.problem} (in {count} of {seen} rows read)",
                remedy(first, data, every=count == seen),
            )
    # Excused rows are never too many, but here nothing else is left.
    elif sum(unfit.every().values()) == seen:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in unfit.every().items())
        yield data.path, f"none of the {seen} rows read can be trained on: {reasons}", "look at the rows"


def text_sizes(data: Data, most: int) -> list[int]:
    """Bytes of what each of the first rows says, of a pair in both answers; empty where they cannot be read here."""
    sizes: list[int] = []
    if not is_local(data.path):
        return sizes
    try:
        data = settled(data)
        for where, row in islice(grouped(data, _Sample(data)), most):
            try:
                sizes.append(sum(len(text.encode()) for text in _texts(data, row, where)))
            except Unfit:
                continue  # such a row is left out of training, too
    except DataError:
        return []  # `validate` and the trainer tell what is wrong with them
    return sizes


def _texts(data: Data, row: Row, where: str) -> list[str]:
    if is_text(data):
        return [text_of(data, row, where)]
    if is_paired(data):
        pair = pair_of(data, row, where)
        return [turn["content"] for side in (pair.chosen, pair.rejected) for turn in side.turns]
    return [turn["content"] for turn in conversation_of(data, row, where).turns]


def _check_row(data: Data, row: Row, where: str, *, only_prompts: bool) -> None:
    """Raise the Unfit that training on this row would raise before it is rendered and tokenized."""
    if is_text(data):
        text_of(data, row, where)
    elif only_prompts:
        prompt_of(data, row, where)
    elif is_paired(data):
        pair_of(data, row, where)
    else:
        conversation_of(data, row, where)
        if row_format(data) == "unpaired":
            is_good(data, row, where)


class _Sample:
    """Rows of files that can be read here, up to some: a login node may have no pyarrow."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self.is_cut = False
        """Whether there may be more rows."""

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        rows, done = 0, 0
        for path in data_files(Path(self._data.path), self._data.split):
            if not tables.can_be_read() and (kind_of_file(path) in (".parquet", ".arrow") or path.suffix == ".zst"):
                continue
            lines = Lines(path)
            for row in rows_of(lines):
                yield row
                rows += 1
                if rows == CHECKED_ROWS or done + lines.position > CHECKED_BYTES:
                    self.is_cut = True
                    return
            done += lines.position
