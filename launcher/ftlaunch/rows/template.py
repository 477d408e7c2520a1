"""Templates over a row's fields, such as "Question: {question}" or "{answer[value]}": reading and filling them."""

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from string import Formatter
from typing import Any, cast

from ftlaunch.errors import UserError

FIELD = re.compile(r"(?P<name>[^\[\]{}.]+)(?P<keys>(?:\[[^\[\]]+\])*)")
KEY = re.compile(r"\[([^\[\]]+)\]")
BRACES = "write {{ and }} for braces that are meant as they are"

Row = dict[str, Any]
FieldPath = tuple[str, ...]
"""A field and the keys looked up in it: ("answer", "value")."""


class DataError(UserError):
    """Something wrong at one place of the data; `problem` reads the same in every row that has it."""

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        super().__init__(f"{where}: {problem}", remedy)
        self.where = where
        self.problem = problem


def template_fields(template: str) -> list[tuple[str, ...]]:
    """The fields of a template in order, each a name and the keys looked up in it: `("answer", "value")`.

    A key of digits is an index where the value is a list. Raises UserError where the template is more than fields
    with keys, so that a template can fetch nothing but what stands in the row.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"is not a template: {error}".lower(), BRACES) from None
    return [_field(name, spec or "", conversion) for _, name, spec, conversion in parts if name is not None]


def _field(name: str, spec: str, conversion: str | None) -> tuple[str, ...]:
    if conversion or spec:
        written = f"{{{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}}}"
        message = f"has {written}, and a field takes no conversion and no format"
        raise UserError(message, f"write {{field}}, or {BRACES}")
    if not name or name.isdecimal():
        raise UserError(f"has {{{name}}}, which names no field", "write the field's name, as in {question}")
    match = FIELD.fullmatch(name)
    if match is None:
        message = f"has {{{name}}}, which is neither {{field}} nor {{field[key]}}"
        raise UserError(message, "write {field} or {field[key]}")
    return (match["name"], *KEY.findall(match["keys"]))


def fill(template: str, row: Row, where: str) -> str:
    """The template with the row's fields in it: "{answer[value]}" is row["answer"]["value"].

    Only keys and list indices are followed, never attributes. Raises DataError naming `where` and the field that is
    missing, null, blank, not finite, or neither text nor a number.
    """
    return "".join(literal + (text_at(row, path, where) if path else "") for literal, path in _pieces(template))


@lru_cache(maxsize=256)
def _pieces(template: str) -> tuple[tuple[str, FieldPath | None], ...]:
    """Literal text, each followed by the path of a field or, at the end and after an escaped brace, by none."""
    paths = iter(template_fields(template))
    parsed = Formatter().parse(template)
    return tuple((literal, None if field is None else next(paths)) for literal, field, _, _ in parsed)


def text_at(row: Row, path: FieldPath, where: str) -> str:
    """The text or number at a path of the row, as text; raises DataError as `fill` does."""
    value: object = value_at(row, path, where)
    field = shown(path)
    if isinstance(value, str):
        return _sound(value, field, where)
    if value is None:
        raise DataError(where, f"field {field} is null", "leave such rows out of the file, or give the field a value")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(where, f"field {field} is {value}", "leave such rows out of the file: this is no value")
    if isinstance(value, int | float):
        return str(value)
    remedy = f"name a part of it, as in {{{shown(path)}[KEY]}}, or use another field"
    raise DataError(where, f"field {field} is {kind_of(value)}, not text or a number", remedy)


def _sound(text: str, field: str, where: str) -> str:
    if not text.strip():
        raise DataError(where, f"field {field} is empty", "leave such rows out of the file, or give the field a value")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        remedy = "write the file again as UTF-8; a program cut a character in two (a lone \\ud800-\\udfff)"
        raise DataError(where, f"field {field} holds half a character", remedy) from error
    return text


def value_at(row: Row, path: FieldPath, where: str) -> Any:
    """Whatever is at a path of the row; raises DataError, which lists the fields there are, where nothing is."""
    value: object = row
    for depth, key in enumerate(path):
        parts = _parts(value)
        if key not in parts:
            remedy = f"{shown(path[:depth]) or 'the row'} has {_present(value, parts)}"
            raise DataError(where, f"field {shown(path[: depth + 1])} is missing", remedy)
        value = parts[key]
    return value


def _parts(value: object) -> Mapping[str, object]:
    """What can be looked up in a value: an object's fields, or a list's items by their index as text."""
    if isinstance(value, Mapping):
        return cast("Mapping[str, object]", value)
    if isinstance(value, list):
        return {str(index): item for index, item in enumerate(cast("list[object]", value))}
    return {}


def _present(value: object, parts: Mapping[str, object]) -> str:
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
}
