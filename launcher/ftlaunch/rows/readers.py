"""Rows of local files, one by one, each with the place it stands at; what a file holds is told by its content."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

from ftlaunch.rows.files import kind_of_file
from ftlaunch.rows.lines import LONGEST_LINE, Lines, refuse_pointer
from ftlaunch.rows.tables import table_rows
from ftlaunch.rows.template import DataError, Misread, Row, kind_of

SAMPLED = 20
"""Lines of a table by which its delimiter is told."""
LONGEST_LITERAL = 10
"""Characters of a value that is broken only because the end of a piece cut it: `-Infinity`."""


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Each row of a data file with its place, such as "facts.jsonl:17".

    Raises DataError, with the file and line, where the file cannot be read, is not UTF-8, breaks the rules of its
    format, holds something else than objects, or has no rows.
    """
    return rows_of(Lines(path))


def rows_of(lines: Lines) -> Iterator[tuple[str, Row]]:
    """`read_rows` of a file whose lines tell how far they have been read."""
    kind = kind_of_file(lines.path)
    if kind in (".parquet", ".arrow"):
        refuse_pointer(lines.path)
        yield from table_rows(lines.path, kind)
        return
    reader = _READERS.get(kind)
    if reader is None:
        raise DataError(str(lines.path), f"files of kind {lines.path.suffix!r} are not read", "see the README's list")
    empty = True
    for where, row in reader(lines):
        if not isinstance(row, dict):
            remedy = 'write each row as an object, like {"question": "…", "answer": "…"}'
            raise DataError(where, f"the row is {kind_of(row)}, not an object", remedy)
        empty = False
        yield where, cast(Row, row)
    if empty:
        raise DataError(str(lines.path), "the file has no rows", "check that it was written to the end")


class Written(float):
    """A number that keeps how it was written: 1.50 stays 1.50 in a template."""

    __slots__ = ("text",)

    def __new__(cls, text: str) -> "Written":
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[Any, ...]:
        # Rows are pickled for worker processes, and a float's own way drops `text`.
        return Written, (self.text,)


class _Decoder(json.JSONDecoder):
    """Decodes one value after the other, and notices a key that an object has twice."""

    def __init__(self) -> None:
        super().__init__(parse_float=Written, object_pairs_hook=self._object)
        self._twice: str | None = None

    def _object(self, pairs: list[tuple[str, object]]) -> Row:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            self._twice = next(name for name in names if names.count(name) > 1)
        return found

    def judged(self, value: object) -> object:
        """The value that was decoded last, as a row that is unfit where one of its objects has a key twice."""
        key, self._twice = self._twice, None
        if key is None or not isinstance(value, dict):
            return value
        return Misread(cast(Row, value), f"the key {key!r} is there twice", "keep the one that is meant")


def _text_rows(lines: Lines) -> Iterator[tuple[str, object]]:
    for line in lines:
        yield lines.at(lines.number), {"text": line.rstrip("\r\n")}


def _json_rows(lines: Lines) -> Iterator[tuple[str, object]]:
    """The rows of a file of JSON: an object a line, one list of objects, or an object that holds one."""
    # The content decides, as .json and .jsonl are often mixed up.
    begins = next((piece for piece in lines.pieces() if piece.strip()), "").lstrip()
    if begins.startswith("["):
        yield from _list_rows(lines)
    elif begins.startswith("{") and not _is_object(begins.partition("\n")[0]):
        yield from _unfolded(_items(lines, opened=True))
    else:
        yield from _line_rows(lines)


def _is_object(line: str) -> bool:
    """Whether a line holds a whole object by itself; one that nests too deeply, or holds
    a number of thousands of digits, is left to the reader of lines."""
    try:
        json.JSONDecoder().raw_decode(line)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        return True
    return True


def _line_rows(lines: Lines) -> Iterator[tuple[str, object]]:
    """An object a line."""
    # Files that were joined each have their byte order mark.
    whole = (line.removeprefix("\ufeff") for line in lines)
    decoder = _Decoder()
    rows = ((lines.at(lines.number), _decoded(decoder, line, lines.at(lines.number))) for line in whole if line.strip())
    # A .jsonl file with a single object has one row, even where a field of it is a list of objects.
    yield from _unfolded(rows) if kind_of_file(lines.path) == ".json" else rows


_FROM_PYTHON = (
    "these are Python's values: `python3 -c 'import ast, json, sys; "
    "[print(json.dumps(ast.literal_eval(row))) for row in sys.stdin if row.strip()]' < FILE > NEW`"
)


def _decoded(decoder: _Decoder, line: str, where: str) -> object:
    try:
        return decoder.judged(decoder.decode(line))
    except (ValueError, RecursionError) as error:
        message, remedy = _misread(error, _one_a_line(line))
        raise DataError(where, f"not JSON: {message}", remedy) from error


def _misread(error: ValueError | RecursionError, remedy: str) -> tuple[str, str]:
    """What is wrong with a value that is not read, and what to do about it, where that is not the `remedy`."""
    if isinstance(error, RecursionError):
        return "a value nests too deeply", "leave such rows out, or write the value as text"
    if not isinstance(error, json.JSONDecodeError):  # Python reads no number of more than 4300 digits
        return "a number has too many digits", 'leave such rows out, or write the number as text, in "…"'
    is_python = error.doc.startswith(("'", "True", "False", "None"), error.pos)
    return error.msg, _FROM_PYTHON if is_python else remedy


def _one_a_line(line: str) -> str:
    """What to do about a line that is no JSON object."""
    bare = line.strip()
    mends = {
        "its lines end in CR alone, as on old Macs: `tr '\\r' '\\n' < FILE > NEW`": "\r" in bare,
        "remove the comma after each object: `sed 's/,[[:space:]]*$//' FILE > NEW`": bare.endswith("},"),
        "write one object a line: `jq -c . FILE > NEW`": "}{" in bare,
        "remove comments: `grep -v '^[[:space:]]*[#/]' FILE > NEW`": bare.startswith(("#", "//")),
        "remove the NULs, which a crash may have left: `tr -d '\\0' < FILE > NEW`": bare.startswith("\0"),
    }
    return next((mend for mend, suits in mends.items() if suits), "write one JSON object a line")


def _unfolded(objects: Iterator[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    """The objects, each a row; of a single one the rows that it holds, if it does."""
    start = list(islice(objects, 2))
    held = _held_rows(start[0][1], start[0][0]) if len(start) == 1 else None
    if held is not None:
        yield from ((f"{start[0][0]} (row {number})", row) for number, row in enumerate(held, start=1))
    else:
        yield from chain(start, objects)


def _held_rows(value: object, where: str) -> list[Row] | None:
    """The rows that an object holds: as its one list of objects, as columns, or under their numbers."""
    if not isinstance(value, dict) or not value:
        return None
    if isinstance(value, Misread):
        raise DataError(where, value.problem, value.remedy)
    found = cast(Row, value)
    lists = [one for one in found.values() if _is_list_of_rows(one)]
    if len(lists) == 1:
        return lists[0]
    if len(lists) > 1:
        named = ", ".join(name for name, one in found.items() if _is_list_of_rows(one))
        raise DataError(where, f"the file holds several lists of rows: {named}", "write each list to a file of its own")
    if (rows := _of_columns(found)) is not None:
        return rows
    if not all(isinstance(one, dict) for one in found.values()):
        return None
    # {"0": {"prompt": "a", …}, "1": …}: pandas' orient="index".
    if all(key.isdecimal() for key in found):
        return list(found.values())
    # {"prompt": {"0": "a", "1": "b"}, "completion": …}: what pandas' to_json writes by default.
    keys = [list(column) for column in found.values()]
    if keys[0] and all(key.isdecimal() for key in keys[0]) and all(one == keys[0] for one in keys):
        return [{name: column[key] for name, column in found.items()} for key in keys[0]]
    return None


def _of_columns(found: Row) -> list[Row] | None:
    """The rows of an object that holds columns, or their names next to the cells of each row."""
    if {"columns", "data"} <= found.keys() <= {"columns", "data", "index"}:
        names, cells = found["columns"], found["data"]
        # {"columns": ["prompt", "completion"], "index": [0], "data": [["a", "b"]]}: pandas' orient="split".
        named = _is_column(names) and all(isinstance(name, str) for name in names)
        if named and _is_column(cells) and all(_is_column(one) and len(one) == len(names) for one in cells):
            return [dict(zip(names, one, strict=True)) for one in cells]
    if all(_is_column(one) for one in found.values()) and len({len(one) for one in found.values()}) == 1:
        # {"prompt": ["a", "b"], "completion": ["c", "d"]}: pandas' orient="list".
        return [dict(zip(found, cells, strict=True)) for cells in zip(*found.values(), strict=True)]
    return None


def _is_list_of_rows(value: object) -> bool:
    """Whether it is a list of objects that are not the turns of one conversation."""
    return _is_column(value) and all(isinstance(item, dict) for item in cast("list[object]", value))


def _is_column(value: object) -> bool:
    """Whether it is a list that holds something, and not the turns of one conversation."""
    items = cast("list[object]", value) if isinstance(value, list) else []
    return bool(items) and not any(isinstance(item, dict) and {"role", "from"} & item.keys() for item in items)


def _list_rows(lines: Lines) -> Iterator[tuple[str, object]]:
    """The items of the file's one list, decoded one by one, with a part of the file in memory."""
    for number, (where, row) in enumerate(_items(lines, opened=False), start=1):
        yield f"{where} (row {number})", row


_LIST = 'write the file as one list of objects, [{"question": "…"}, …], or as .jsonl'


def _items(lines: Lines, *, opened: bool) -> Iterator[tuple[str, object]]:
    """Each item of a JSON list, with the line that it starts on; if `opened`, of items one after the other."""
    text = _Text(lines)
    try:
        if not opened and text.skip_space():
            text.expect("[")
        while text.skip_space() and not (not opened and text.take("]")):
            yield lines.at(text.line), text.item()
            text.skip_space()
            if not opened and not text.starts("]"):
                text.expect(",")
                # JSON has no comma after the last item: without this check [{…},] would be taken for a whole list.
                if not text.skip_space() or text.starts("]"):
                    raise json.JSONDecodeError("expected a row after the comma", text.buffer, text.index)
        if text.skip_space():
            raise json.JSONDecodeError("something stands after the list", text.buffer, text.index)
    except json.JSONDecodeError as error:
        # `line` is where the row begins, and the mistake may be further down in it.
        line = text.line + error.doc.count("\n", text.index, error.pos)
        message, remedy = _misread(error, _LIST)
        raise DataError(lines.at(line), f"not {'JSON' if opened else 'a JSON list'}: {message}", remedy) from error
    except (ValueError, RecursionError) as error:
        message, remedy = _misread(error, _LIST)
        raise DataError(lines.at(text.line), f"not JSON, in the row that begins here: {message}", remedy) from error


_SPACE = re.compile(r"[ \t\r\n]*")


class _Text:
    """A file's text, of which only what is not read yet is kept."""

    def __init__(self, lines: Lines) -> None:
        self._pieces = lines.pieces()
        self._decoder = _Decoder()
        self.buffer = ""
        self.index = 0
        self.line = 1

    def _more(self) -> bool:
        """Read on; False at the end."""
        piece = next(self._pieces, None)
        # An empty piece is not the end: the decoder may keep bytes back for the next one.
        while piece == "":
            piece = next(self._pieces, None)
        if piece is None:
            return False
        self.buffer, self.index = self.buffer[self.index :] + piece, 0
        return True

    def _forward(self, index: int) -> None:
        self.line += self.buffer.count("\n", self.index, index)
        self.index = index

    def skip_space(self) -> bool:
        """Go to what is no space; False where nothing is left."""
        while True:
            match = _SPACE.match(self.buffer, self.index)
            assert match
            self._forward(match.end())
            if self.index < len(self.buffer):
                return True
            if not self._more():
                return False

    def starts(self, sign: str) -> bool:
        return self.buffer.startswith(sign, self.index)

    def take(self, sign: str) -> bool:
        """Whether the sign comes next; if so it is passed."""
        found = self.starts(sign)
        self.index += found
        return found

    def expect(self, sign: str) -> None:
        if not self.take(sign):
            found = self.buffer[self.index : self.index + 1] or "the end"
            raise json.JSONDecodeError(f"expected {sign!r}, found {found!r}", self.buffer, self.index)

    def item(self) -> object:
        """The value that comes next. What looks broken may only be cut off by the end of a piece."""
        while True:
            try:
                item, end = self._decoder.raw_decode(self.buffer, self.index)
            except json.JSONDecodeError as error:
                # A text that was cut is "Unterminated"; any other value is cut within its last few characters.
                may_go_on = error.msg.startswith("Unterminated") or error.pos > len(self.buffer) - LONGEST_LITERAL
                if not (may_go_on and self._more()):
                    raise
                continue
            if end == len(self.buffer) and self._more():
                continue  # a number may go on
            self._forward(end)
            return self._decoder.judged(item)


def _csv_rows(lines: Lines) -> Iterator[tuple[str, object]]:
    records = _records(lines)
    names = [name.strip() for name in next(records, _NO_RECORD)[1]]
    # pandas' to_csv writes the index as a first column without a name.
    indexed = names[:1] == [""]
    if len(set(names)) < len(names) or "" in names[1:]:
        bad = next(name for index, name in enumerate(names) if (not name and index) or name in names[:index])
        problem = f"column {bad!r} is named twice" if bad else "a column has no name"
        raise DataError(lines.at(1), problem, "give each column of the first line a name of its own")
    for where, record in records:
        if len(record) != len(names):
            remedy = 'mend the line; text with a comma, a quote or a line end goes in "…", with quotes doubled'
            raise DataError(where, f"{len(record)} cells under {len(names)} columns", remedy)
        yield where, dict(zip(names[indexed:], record[indexed:], strict=True))


_NO_RECORD: tuple[str, list[str]] = ("", [])


def _records(lines: Lines) -> Iterator[tuple[str, list[str]]]:
    """Each record that is not blank, with the line it starts at."""
    # The default of 128 KiB is too little for long documents.
    csv.field_size_limit(LONGEST_LINE)
    text = iter(lines)
    sample = list(islice(text, SAMPLED))
    start = 1
    # Excel's own first line, "sep=;", which gives the delimiter.
    if sample and (told := re.fullmatch(r"sep=(.)\s*", sample[0], re.IGNORECASE)):
        delimiter, start = told[1], 2
        sample = sample[1:]
    else:
        delimiter = _delimiter(sample)
    # In `a, "b"` the quotes would be part of the cell if the blank in front of them were not skipped.
    spaced = any(f'{delimiter} "' in line for line in sample)
    skipped = start - 1
    # strict: a quote that is never closed is an error and does not swallow the rest of the file as one cell.
    reader = csv.reader(chain(sample, text), delimiter=delimiter, skipinitialspace=spaced, strict=True)
    try:
        for record in reader:
            if record:
                yield lines.at(start), record
            # A quoted cell may hold line ends, so a record can take several lines.
            start = skipped + reader.line_num + 1
    except csv.Error as error:
        remedy = 'put text with a comma, a quote or a line end in "…", with quotes doubled, and close each "'
        if "new-line character" in str(error):
            remedy = "its lines end in CR alone, as on old Macs: `tr '\\r' '\\n' < FILE > NEW`"
        raise DataError(lines.at(start), f"not CSV: {error}", remedy) from error


def _delimiter(sample: list[str]) -> str:
    """What separates the cells: the sign that gives every record as many cells as the first line has names."""

    def fits(sign: str) -> tuple[bool, int]:
        try:
            widths = [len(record) for record in csv.reader(sample, delimiter=sign) if record]
        except csv.Error:
            return False, 0
        whole = widths[:-1] if len(sample) == SAMPLED else widths  # the last record may be cut off
        return bool(widths) and widths[0] > 1 and len(set(whole or widths)) == 1, widths[0] if widths else 0

    return max(",;\t|", key=fits)


_READERS: dict[str, Callable[[Lines], Iterator[tuple[str, Any]]]] = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".txt": _text_rows,
}
