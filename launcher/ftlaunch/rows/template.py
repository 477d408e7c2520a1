"""Templates over a row's fields, such as "Question: {question}" or "{answer[value]}": reading and filling them."""

import datetime
import decimal
import math
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, cast

from msgspec import Struct

from ftlaunch.errors import UserError

# Without ".", "!" and ":", which format strings use for attributes, conversions and formats.
FIELD = re.compile(r"(?P<name>[^\[\]{}.!:]+)(?P<keys>(?:\[[^\[\]]+\])*)")
KEY = re.compile(r"\[([^\[\]]+)\]")
# Doubled braces come first, so that {{x}} is text, and {? before a plain field.
TOKEN = re.compile(r"\{\{|\}\}|\{\?|\{[^{}]*\}|[{}]")
BRACES = "write {{ and }} for braces that are meant as they are"
CONTROL = re.compile("[\x00\x80-\x9f]")
"""What no text holds, and a file decoded as what it is not does: NUL and the C1 controls."""

NO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff"
"""Characters of no width, which `strip` leaves."""

Row = dict[str, Any]


class Misread(Row):
    """A row of which its file leaves open what it says, so that it is unfit for the reason given."""

    def __init__(self, row: Row, problem: str, remedy: str) -> None:
        super().__init__(row)
        self.problem = problem
        self.remedy = remedy


FieldPath = tuple[str, ...]
"""A field and the keys looked up in it: ("answer", "value")."""


class DataError(UserError):
    """Something wrong at one place of the data; `problem` reads the same in every row that has it."""

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        super().__init__(f"{where}: {problem}", remedy)
        self.where = where
        self.problem = problem

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled with `args`, which are not what __init__ takes: a worker's error could not be rebuilt.
        return type(self), (self.where, self.problem, self.remedy)


class Unfit(DataError):
    """A row that cannot be trained on, and is left out: `reason` says why, and is the same in every such row."""

    is_excused = False
    """Whether it is as it should be that there are such rows, so that their share does not matter."""

    @property
    def reason(self) -> str:
        # messages[3] and messages[7] are one reason: indices differ from row to row.
        return re.sub(r"\[\d+\]", "[]", self.problem)


class Excused(Unfit):
    """A row that is left out and is no mistake: a blank row of text, a pair without a better answer, one too long."""

    is_excused = True


class Place(Struct, frozen=True):
    """A field in a template."""

    path: FieldPath
    is_optional: bool
    """Written {field?}: empty where the row has nothing there."""


Piece = str | Place


class Part(Struct, frozen=True):
    """A stretch of a template; one that is written {?…} vanishes where a field of its is blank."""

    pieces: tuple[Piece, ...]
    may_vanish: bool


def template_fields(template: str) -> list[FieldPath]:
    """The fields of a template in order, each a name and the keys looked up in it: `("answer", "value")`.

    A key of digits is an index where the value is a list. Raises UserError where the template is more than fields
    with keys, so that a template can fetch nothing but what stands in the row.
    """
    return [place.path for place in _places(template)]


def bare_field(template: str) -> str | None:
    """The field of a template that is nothing but this field, as "{input}"; None of any other."""
    match parts_of(template):
        case (Part(pieces=(Place(path=(name,)),), may_vanish=False),):
            return name
        case _:
            return None


def optional_fields(template: str) -> set[str]:
    """The names of the fields that rows may lack: those of {field?} and in a part {?…}."""
    return {
        piece.path[0]
        for part in parts_of(template)
        for piece in part.pieces
        if isinstance(piece, Place) and (part.may_vanish or piece.is_optional)
    }


def _places(template: str) -> list[Place]:
    return [piece for part in parts_of(template) for piece in part.pieces if isinstance(piece, Place)]


# A data set has a few templates, and each is asked for in every row.
@lru_cache(maxsize=256)
def parts_of(template: str) -> tuple[Part, ...]:
    """The template read. Raises UserError as `template_fields` does."""
    parts, pieces, inside = [Part((), may_vanish=False)], list[Piece](), False
    for token in _tokens(template):
        if (token == "{?" and not inside) or (token == "}" and inside):
            parts.append(Part(tuple(pieces), may_vanish=inside))
            pieces, inside = [], not inside
        elif token in ("{", "}", "{?"):
            raise UserError(f"is not a template: a {token} stands alone", BRACES)
        elif token in ("{{", "}}"):
            # "{{" is written for "{".
            pieces.append(token[0])
        elif token.startswith("{"):
            pieces.append(_place(token[1:-1]))
        else:
            pieces.append(token)
    if inside:
        raise UserError("has a part {?… that is not closed", "write } where the part ends")
    parts.append(Part(tuple(pieces), may_vanish=False))
    for part in parts:
        if part.may_vanish and not any(isinstance(piece, Place) for piece in part.pieces):
            raise UserError("has a part {?…} without a field", "name the field with which it vanishes, as in {?: {a}}")
    return tuple(part for part in parts if part.pieces)


def _tokens(template: str) -> Iterator[str]:
    """Braces, fields with their braces, and the text between them."""
    end = 0
    for match in TOKEN.finditer(template):
        if match.start() > end:
            yield template[end : match.start()]
        yield match[0]
        end = match.end()
    if end < len(template):
        yield template[end:]


def _place(written: str) -> Place:
    """What stands between the braces of a field."""
    name = written.removesuffix("?")
    if "!" in (bare := KEY.sub("", name)) or ":" in bare:
        message = f"has {{{written}}}, and a field takes no conversion and no format"
        raise UserError(message, f"write {{field}}, or {BRACES}")
    if not name or name.isdecimal():
        raise UserError(f"has {{{written}}}, which names no field", "write the field's name, as in {question}")
    match = FIELD.fullmatch(name)
    if match is None:
        message = f"has {{{written}}}, which is neither {{field}} nor {{field[key]}}"
        raise UserError(message, "write {field} or {field[key]}")
    return Place((match["name"], *KEY.findall(match["keys"])), is_optional=name != written)


def fill(template: str, row: Row, where: str) -> str:
    """The template with the row's fields in it: "{answer[value]}" is row["answer"]["value"].

    Only keys and list indices are followed, never attributes. Raises Unfit naming `where` and the field that is
    missing, null, blank, not finite, or neither text nor a number, unless the field or its part is optional.
    """
    return "".join(_filled(part, row, where) for part in parts_of(template))


def _filled(part: Part, row: Row, where: str) -> str:
    if part.may_vanish and any(is_blank(row, piece.path) for piece in part.pieces if isinstance(piece, Place)):
        return ""
    return "".join(piece if isinstance(piece, str) else _text_of(piece, row, where) for piece in part.pieces)


def _text_of(place: Place, row: Row, where: str) -> str:
    if not is_blank(row, place.path):
        return text_at(row, place.path, where)
    if place.is_optional:
        return ""
    try:
        return text_at(row, place.path, where)
    except Unfit as unfit:
        name = shown(place.path)
        remedy = (
            f"{unfit.remedy}; where rows may lack it, write {{{name}?}}, or {{?TEXT {{{name}}}}} to leave TEXT out too"
        )
        raise Unfit(where, unfit.problem, remedy) from None


def is_blank(row: Row, path: FieldPath) -> bool:
    """Whether the row has nothing there: no such field, null, NaN, blank text or an empty list or object."""
    value: object = row
    for key in path:
        parts = _parts(value)
        if key not in parts:
            return True
        value = parts[key]
    if isinstance(value, str):
        return not seen(value)
    # Only NaN differs from itself; pandas has it for an empty cell.
    return value is None or value != value or (isinstance(value, list | dict) and not value)


def text_at(row: Row, path: FieldPath, where: str) -> str:
    """The text, number, date or truth value at a path of the row, as text; raises Unfit as `fill` does."""
    value: object = value_at(row, path, where)
    if isinstance(value, str):
        return sound(value, shown(path), where)
    return _as_text(value, shown(path), where)


def _as_text(value: object, field: str, where: str) -> str:
    if value is None:
        raise Unfit(where, f"field {field} is null", "leave such rows out of the file, or give the field a value")
    # Before the numbers, as True is an int in Python.
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float | decimal.Decimal) and not math.isfinite(value):
        raise Unfit(where, f"field {field} is {value}", "leave such rows out of the file: this is no value")
    if isinstance(value, decimal.Decimal):
        # Decimal("1E+3") is 1000 and not 1E+3, as str() writes it.
        return f"{value:f}"
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, int | float):
        return str(value)
    remedy = f"name a part of it, as in {{{field}[KEY]}}, or use another field"
    raise Unfit(where, f"field {field} is {kind_of(value)}, not text or a number", remedy)


def seen(text: str) -> str:
    """What of a text is there to see: without space and characters of no width at its ends."""
    bare = text.strip()
    return bare if bare.isascii() else bare.strip(NO_WIDTH).strip()


def sound(text: str, field: str, where: str) -> str:
    """The text, if it is one that can be trained on. Raises Unfit."""
    if not seen(text):
        raise Unfit(where, f"field {field} is empty", "leave such rows out of the file, or give the field a value")
    # isascii is quick and true of most rows, in which NUL alone can be wrong.
    if text.isascii():
        if "\0" not in text:
            return text
    elif not CONTROL.search(text):
        try:
            # JSON can hold half of a pair, such as "\ud83d", which UTF-8 cannot write.
            text.encode()
        except UnicodeEncodeError as error:
            remedy = "write the file again as UTF-8; a program cut a character in two (a lone \\ud800-\\udfff)"
            raise Unfit(where, f"field {field} holds half a character", remedy) from error
        return text
    remedy = "it was decoded as what it is not: write it again from its source, `iconv -f cp1252` or `-f utf-16`"
    raise Unfit(where, f"field {field} holds control characters (NUL or U+0080 to U+009F)", remedy)


def value_at(row: Row, path: FieldPath, where: str) -> Any:
    """Whatever is at a path of the row; raises Unfit, which lists the fields there are, where nothing is."""
    if isinstance(row, Misread):
        raise Unfit(where, row.problem, row.remedy)
    value: object = row
    for depth, key in enumerate(path):
        parts = _parts(value)
        if key not in parts:
            remedy = f"{shown(path[:depth]) or 'the row'} has {present(value, parts)}"
            raise Unfit(where, f"field {shown(path[: depth + 1])} is missing", remedy)
        value = parts[key]
    return value


def _parts(value: object) -> Mapping[str, object]:
    """What can be looked up in a value: an object's fields, or a list's items by their index as text."""
    if isinstance(value, Mapping):
        return cast("Mapping[str, object]", value)
    if isinstance(value, list):
        return {str(index): item for index, item in enumerate(cast("list[object]", value))}
    return {}


def present(value: object, parts: Mapping[str, object]) -> str:
    """What there is in a value, by its parts, in a user's words."""
    if isinstance(value, list):
        return f"{len(parts)} items, counted from 0"
    if parts:
        return f"the fields {', '.join(parts)}: use one of these"
    return f"no fields in it: it is {kind_of(value)}"


def shown(path: FieldPath) -> str:
    """The path as a template writes it: `answer[value]`."""
    return "".join(key if depth == 0 else f"[{key}]" for depth, key in enumerate(path))


def kind_of(value: object) -> str:
    """What a JSON or parquet value is, in a user's words."""
    return _KINDS.get(type(value).__name__, f"a {type(value).__name__}")


_KINDS = {
    "NoneType": "null",
    "bool": "true or false",
    "str": "text",
    "int": "a number",
    "float": "a number",
    "dict": "an object",
    "list": "a list",
    "bytes": "binary data",
}
