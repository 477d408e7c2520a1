"""Rows of local .csv, .json and .jsonl files, one by one, each with the place it stands at."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NoReturn, cast

from ftlaunch.rows.template import DataError, Row, kind_of

SUFFIXES: Final = (".csv", ".json", ".jsonl", ".parquet")
LONGEST_LINE: Final = 8 * 2**20
"""Bytes. A longer line is a file of another kind, or one whose line ends were lost."""

_SUPPORTED = f"use {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
_ENCODING = "write the file again as UTF-8, for example with `iconv -f latin1 -t utf-8`"


def is_local(path: str) -> bool:
    """Whether a `Data.path` names a file or folder here, rather than a data set of the hub."""
    return path.startswith(("/", "./", "../", "~")) or path.endswith(SUFFIXES) or Path(path).exists()


def data_files(path: Path) -> list[Path]:
    """The file itself, or a folder's data files in the order of their names. Raises DataError where there is none."""
    path = path.expanduser()
    if not path.exists():
        raise DataError(str(path), "no such file or folder", "check the path; relative ones count from where you are")
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(str(path), f"files of kind {path.suffix!r} are not read", _SUPPORTED)
        return [path]
    found = sorted(
        file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file() and file.name[0] != "."
    )
    if not found:
        raise DataError(str(path), "the folder has no data files", _SUPPORTED)
    return found


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Each row of a .csv, .json or .jsonl file with its place, such as "facts.jsonl:17".

    Raises DataError, with the file and line, where the file cannot be read, is not UTF-8, breaks the rules of its
    format, holds something else than objects, or has no rows.
    """
    return rows_of(Lines(path))


class Lines:
    """The decoded lines of a file, line ends kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0
        self.position = 0
        """Bytes read so far."""

    def at(self, line: int) -> str:
        return f"{self.path}:{line}"

    def __iter__(self) -> Iterator[str]:
        try:
            with self.path.open("rb") as file:
                while raw := file.readline(LONGEST_LINE + 1):
                    self.number += 1
                    self.position += len(raw)
                    yield self._decoded(raw)
        except OSError as error:
            raise DataError(str(self.path), f"cannot be read: {error.strerror}", "check the path") from error

    def _decoded(self, raw: bytes) -> str:
        if len(raw) > LONGEST_LINE:
            problem = f"the line is longer than {LONGEST_LINE // 2**20} MiB"
            raise DataError(self.at(self.number), problem, "put each row on a line of its own, or cut the row down")
        try:
            return raw.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(self.at(self.number), error) from error


def _not_utf8(where: str, error: UnicodeDecodeError) -> DataError:
    return DataError(where, f"not UTF-8 (byte 0x{error.object[error.start]:02x})", _ENCODING)


def rows_of(lines: Lines) -> Iterator[tuple[str, Row]]:
    """`read_rows` of a file whose lines tell how far they have been read."""
    reader = _READERS.get(lines.path.suffix)
    if reader is None:
        raise DataError(str(lines.path), f"files of kind {lines.path.suffix!r} are not read", _SUPPORTED)
    empty = True
    for where, row in reader(lines):
        if not isinstance(row, dict):
            remedy = 'write each row as an object, like {"question": "…", "answer": "…"}'
            raise DataError(where, f"the row is {kind_of(row)}, not an object", remedy)
        empty = False
        yield where, cast(Row, row)
    if empty:
        raise DataError(str(lines.path), "the file has no rows", "check that it was written to the end")


def _jsonl_rows(lines: Lines) -> Iterator[tuple[str, object]]:
    for line in lines:
        if line.strip():
            yield lines.at(lines.number), _decoded_json(line, lines.at(lines.number))


def _decoded_json(line: str, where: str) -> object:
    try:
        return _JSON.decode(line)
    except (ValueError, RecursionError) as error:
        message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(where, f"not JSON: {message}", "write one JSON object a line") from error


def _no_number(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is no number")


_JSON = json.JSONDecoder(parse_constant=_no_number)


def _json_rows(lines: Lines) -> Iterator[tuple[str, object]]:
    """The items of the file's one list, decoded one by one."""
    text = _whole(lines)
    line, counted = 1, 0
    try:
        for number, (start, row) in enumerate(_items(text), start=1):
            line += text.count("\n", counted, start)
            counted = start
            yield f"{lines.at(line)} (row {number})", row
    except json.JSONDecodeError as error:
        raise DataError(lines.at(error.lineno), f"not a JSON list: {error.msg}", _LIST) from error
    except (ValueError, RecursionError) as error:
        raise DataError(lines.at(line), f"not JSON, in the row after this line: {error}", _LIST) from error


_LIST = 'write the file as one list of objects, [{"question": "…"}, …], or as .jsonl'


def _whole(lines: Lines) -> str:
    try:
        raw = lines.path.read_bytes()
        lines.position = len(raw)
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise DataError(str(lines.path), f"cannot be read: {error.strerror}", "check the path") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(lines.at(error.object.count(b"\n", 0, error.start) + 1), error) from error


def _items(text: str) -> Iterator[tuple[int, object]]:
    """Each item of a JSON list and the index at which it starts. Raises JSONDecodeError."""
    index = _after_space(text, 0)
    if index == len(text):
        return
    index = _after_space(text, _expect(text, index, "["))
    closed = text.startswith("]", index)
    while not closed:
        item, end = _JSON.raw_decode(text, index)
        yield index, item
        index = _after_space(text, end)
        closed = text.startswith("]", index)
        if not closed:
            index = _after_space(text, _expect(text, index, ","))
    index = _after_space(text, index + 1)
    if index < len(text):
        raise json.JSONDecodeError("something stands behind the list", text, index)


_SPACE = re.compile(r"[ \t\r\n]*")


def _after_space(text: str, index: int) -> int:
    match = _SPACE.match(text, index)
    assert match
    return match.end()


def _expect(text: str, index: int, sign: str) -> int:
    if not text.startswith(sign, index):
        raise json.JSONDecodeError(f"expected {sign!r}, found {text[index : index + 1] or 'the end'!r}", text, index)
    return index + 1


def _csv_rows(lines: Lines) -> Iterator[tuple[str, object]]:
    records = _records(lines)
    names = [name.strip() for name in next(records, _NO_RECORD)[1]]
    if len(set(names)) < len(names) or "" in names:
        bad = next(name for index, name in enumerate(names) if not name or name in names[:index])
        problem = f"column {bad!r} is named twice" if bad else "a column has no name"
        raise DataError(lines.at(1), problem, "give each column of the first line a name of its own")
    for where, record in records:
        if len(record) != len(names):
            remedy = 'mend the line; text with a comma, a quote or a line end goes in "…", with quotes doubled'
            raise DataError(where, f"{len(record)} cells under {len(names)} columns", remedy)
        yield where, dict(zip(names, record, strict=True))


_NO_RECORD: tuple[str, list[str]] = ("", [])


def _records(lines: Lines) -> Iterator[tuple[str, list[str]]]:
    """Each record that is not blank, with the line it starts at."""
    csv.field_size_limit(LONGEST_LINE)
    reader = csv.reader(iter(lines), strict=True)
    start = 1
    try:
        for record in reader:
            if record:
                yield lines.at(start), record
            start = reader.line_num + 1
    except csv.Error as error:
        remedy = 'put text with a comma, a quote or a line end in "…", with quotes doubled, and close each "'
        raise DataError(lines.at(start), f"not CSV: {error}", remedy) from error


_READERS: dict[str, Callable[[Lines], Iterator[tuple[str, Any]]]] = {
    ".csv": _csv_rows,
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
}
