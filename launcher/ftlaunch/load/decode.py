"""Judges a recipe's tables against the vocabulary, key by key, and finds every mistake rather than the first.

It knows structs, their fields and their tags, and no key of a recipe but those in the table below: a new kind of
adapter or stage needs no change here.
"""

import functools
from collections.abc import Sequence
from typing import Any

import msgspec.inspect as types
from msgspec import NODEFAULT, Struct

from ftlaunch.errors import Problem
from ftlaunch.load.key_advice import Table, advise, names, structs, tables_of
from ftlaunch.load.messages import as_toml, closest, did_you_mean, expected, join_or, quote
from ftlaunch.load.origins import KeyPath, SourceMap, Toml, dotted, quoted_key
from ftlaunch.load.paths import type_of
from ftlaunch.load.type_check import matches, probable_value

MANY_LINES = frozenset({"prompt", "completion", "system", "chosen", "rejected"})
"""Keys whose text may have line breaks and tabs."""


def find_problems(form: type[Struct], values: dict[str, Toml], where: SourceMap) -> list[Problem]:
    """Everything that keeps the tables from being a `form`; if there is nothing, `msgspec.convert` will accept them."""
    top, tables = _known(form)
    checker = _Checker(tables, where)
    checker.table((top,), values, ())
    return checker.problems


@functools.cache
def _known(form: type[Struct]) -> tuple[types.StructType, tuple[Table, ...]]:
    """What the top of a `form` may hold, and all of its tables."""
    top = type_of(form)
    assert isinstance(top, types.StructType)
    return top, tuple(tables_of(top))


class _Checker:
    def __init__(self, tables: tuple[Table, ...], where: SourceMap) -> None:
        self.tables = tables
        self.where = where
        self.problems: list[Problem] = []

    def table(self, kinds: Sequence[types.StructType], values: dict[str, Toml], path: KeyPath) -> None:
        kind = self._kind(kinds, values, path)
        if kind is None:
            return
        fields = {field.encode_name: field for field in kind.fields}
        present = {*values}
        for key, value in values.items():
            if key in fields:
                self._value(fields[key].type, value, (*path, key), _otherwise(fields[key]))
            elif key != kind.tag_field:
                advice = advise(self.tables, key, kind, kinds)
                # A required key that is misspelt is not reported as missing as well.
                present |= {advice.meant} if advice.meant else set()
                self._add((*path, key), advice.message, advice.remedy)
        for key, field in fields.items():
            if field.required and key not in present:
                self._missing(field, path)

    def _kind(
        self, kinds: Sequence[types.StructType], values: dict[str, Toml], path: KeyPath
    ) -> types.StructType | None:
        """What the table is, or was probably meant to be; None where that cannot be told."""
        tag_field = kinds[0].tag_field
        if tag_field is None:
            return kinds[0]
        tags = {kind.tag: kind for kind in kinds if isinstance(kind.tag, str)}
        tag = values.get(tag_field)
        if isinstance(tag, str) and tag in tags:
            return tags[tag]
        # The keys may fit a single kind: beta1 is known to "adalora" alone.
        fitting = [str(kind.tag) for kind in kinds if {*values} <= {*names(kind)}]
        guess = fitting[0] if len(fitting) == 1 else None
        wanted = join_or(map(as_toml, tags))
        otherwise = f"write {tag_field} = {as_toml(guess) if guess else wanted}"
        if tag is None:
            self._add((*path, tag_field), f"is missing: expected {wanted}", otherwise)
            # Judged as what it probably is, so that other mistakes in the table are found in the same pass.
            return tags.get(guess or "")
        near = closest(tag, tags) if isinstance(tag, str) else None
        remedy = f"did you mean {as_toml(near)}?" if near else otherwise
        self._add((*path, tag_field), f"expected {wanted}, got {quote(tag)}", remedy)
        return tags.get(near or "")

    def _value(self, kind: types.Type, value: Toml, path: KeyPath, otherwise: str) -> None:
        tables = structs(kind)
        if isinstance(kind, types.DictType) and not tables:
            self._entries(kind, value, path)
        elif not tables:
            self._plain(kind, value, path, otherwise)
        elif isinstance(kind, types.ListType):
            self._list_of_tables(kind, value, path)
        elif isinstance(kind, types.DictType):
            self._named_tables(kind, value, path)
        elif isinstance(value, dict):
            self.table(tables, value, path)
        # model.quantization takes a word or a table, so anything else is judged as a word.
        elif any(isinstance(member, types.LiteralType) for member in _members(kind)):
            self._plain(kind, value, path, otherwise)
        else:
            # adapter = "lora" was meant as [adapter] with kind = "lora".
            tags = [as_toml(table.tag) for table in tables if table.tag == value]
            remedy = f" with {tables[0].tag_field} = {tags[0]}" if tags else ""
            self._add(path, f"expected a table, got {quote(value)}", f"write {_header(path)}{remedy}")

    def _list_of_tables(self, kind: types.ListType, value: Toml, path: KeyPath) -> None:
        if isinstance(value, list) and len(value) >= (kind.min_length or 0):
            for index, element in enumerate(value):
                self._value(kind.item_type, element, (*path, index), "")
        else:
            self._add(
                path, f"expected tables headed {_header((*path, 0))}, got {quote(value)}", _add_header((*path, 0))
            )

    def _named_tables(self, kind: types.DictType, value: Toml, path: KeyPath) -> None:
        header = _header((*path, "NAME"))
        if not isinstance(value, dict):
            self._add(path, f"expected tables headed {header}, got {quote(value)}", f"write {header}")
            return
        # [data] with path = "…" lacks a name: path is a key and not the name of a data set.
        keys = {key for table in structs(kind) for key in names(table)}
        stray = [key for key, element in value.items() if key in keys and not isinstance(element, dict)]
        if stray:
            self._add((*path, stray[0]), "stands in a table that has no name of its own", f"head the table {header}")
        for key, element in value.items():
            if key in stray:
                continue
            self._name(kind, key, path)
            self._value(kind.value_type, element, (*path, key), "")

    def _entries(self, kind: types.DictType, value: Toml, path: KeyPath) -> None:
        """A table whose keys the user names, each with a plain value."""
        if not isinstance(value, dict):
            self._add(path, f"expected a table, got {quote(value)}", f"write {_header(path)}")
            return
        for key, element in value.items():
            self._name(kind, key, path)
            self._plain(kind.value_type, element, (*path, key), "give it such a value, or leave it out")

    def _name(self, kind: types.DictType, key: str, path: KeyPath) -> None:
        if not matches(kind.key_type, key):
            message = f"expected a name that is {expected(kind.key_type)}, got {quote(key)}"
            self._add((*path, key), message, "rename it")

    def _plain(self, kind: types.Type, value: Toml, path: KeyPath, otherwise: str) -> None:
        many_lines = bool(MANY_LINES.intersection(path[-1:]))
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (control := _control_character(text, many_lines=many_lines)):
                self._add(path, f"has the control character {control!r} in {quote(text)}", "remove that character")
                return
        if not matches(kind, value):
            remedy = _remedy(kind, value, path, otherwise)
            self._add(path, f"expected {expected(kind)}, got {_offender(kind, value)}", remedy)

    def _missing(self, field: types.Field, path: KeyPath) -> None:
        key = (*path, field.encode_name)
        if structs(field.type):
            last = (*key, 0) if isinstance(field.type, types.ListType) else key
            self._add(key, "is missing", _add_header(last))
        else:
            place = _header(path) if path else "the top of the file"
            self._add(key, f"is missing: expected {expected(field.type)}", f"add {field.encode_name} = … to {place}")

    def _add(self, path: KeyPath, message: str, remedy: str) -> None:
        self.problems.append(Problem(self.where(path), dotted(path), message, remedy))


def _otherwise(field: types.Field) -> str:
    """The remedy of last resort for a wrong value."""
    default: Any = field.default
    if field.required:
        return "give it such a value"
    if default is NODEFAULT or default is None:
        return "give it such a value, or leave it out"
    return f"give it such a value, or leave it out for the default, {as_toml(default)}"


def _remedy(kind: types.Type, value: Toml, path: KeyPath, otherwise: str) -> str:
    options = [option for member in _members(kind) if isinstance(member, types.LiteralType) for option in member.values]
    if isinstance(value, str) and options:
        return did_you_mean(value, map(str, options), otherwise)
    instead = probable_value(kind, value)
    return otherwise if instead is None else f"write {quoted_key(str(path[-1]))} = {as_toml(instead)}"


def _members(kind: types.Type) -> tuple[types.Type, ...]:
    return kind.types if isinstance(kind, types.UnionType) else (kind,)


def _offender(kind: types.Type, value: Toml) -> str:
    """The value, or the first element of it that spoils a list."""
    items = next((member.item_type for member in _members(kind) if isinstance(member, types.ListType)), None)
    if items is None or not isinstance(value, list):
        return quote(value)
    return f"a list with {quote(next((element for element in value if not matches(items, element)), value))}"


def _control_character(text: str, *, many_lines: bool) -> str | None:
    """The first control character that does not belong, as it might be one that a terminal obeys."""
    allowed = "\n\t" if many_lines else ""
    return next((char for char in text if (ord(char) < 32 or ord(char) == 127) and char not in allowed), None)


def _header(path: KeyPath) -> str:
    """The header of the table at the path: `[data.trivia]`, `[[stage]]`."""
    name = ".".join(quoted_key(part) for part in path if isinstance(part, str))
    return f"[[{name}]]" if isinstance(path[-1], int) else f"[{name}]"


def _add_header(path: KeyPath) -> str:
    return f"add a table headed {_header(path)}"
