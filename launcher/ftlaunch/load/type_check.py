"""Whether a value suits a type of the vocabulary, and the value that was probably meant where it does not."""

import re
import tomllib
from collections.abc import Iterator
from contextlib import suppress

import msgspec.inspect as types

from ftlaunch.load.messages import as_toml
from ftlaunch.load.origins import Toml

LARGEST = 2**63 - 1
"""msgspec's integers have 64 bits."""


def matches(kind: types.Type, value: Toml) -> bool:
    """Whether the value is of the type and within its bounds; tables are not looked into."""
    match kind:
        case types.Metadata():
            return matches(kind.type, value)
        case types.UnionType():
            return any(matches(member, value) for member in kind.types)
        case types.ListType():
            return isinstance(value, list) and _is_list(kind, value)
        case types.TupleType():
            kinds = kind.item_types
            return isinstance(value, list) and len(value) == len(kinds) and all(map(matches, kinds, value))
        case types.BoolType():
            return isinstance(value, bool)
        case types.LiteralType():
            return isinstance(value, str) and value in kind.values
        case types.StrType():
            return isinstance(value, str) and _is_text(kind, value)
        case types.IntType() | types.FloatType():
            return _is_number(kind, value)
        case _:
            return False


def _is_list(kind: types.ListType, value: list[Toml]) -> bool:
    return len(value) >= (kind.min_length or 0) and all(matches(kind.item_type, element) for element in value)


def _is_text(kind: types.StrType, value: str) -> bool:
    if len(value) < (kind.min_length or 0) or (kind.max_length is not None and len(value) > kind.max_length):
        return False
    # `search`, as msgspec does: patterns have their own anchors.
    return kind.pattern is None or re.search(kind.pattern, value) is not None


def _is_number(kind: types.IntType | types.FloatType, value: Toml) -> bool:
    # True is an int in Python and no number in TOML.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(kind, types.IntType) and isinstance(value, float):
        return False
    if not -LARGEST <= value <= LARGEST:  # neither nan nor an infinity passes
        return False
    return (
        (kind.gt is None or value > kind.gt)
        and (kind.ge is None or value >= kind.ge)
        and (kind.lt is None or value < kind.lt)
        and (kind.le is None or value <= kind.le)
    )


def probable_value(kind: types.Type, value: Toml) -> Toml | None:
    """A value of the type that says the same, such as 5 for '5'; None where there is none."""
    return next((candidate for candidate in _alike(value) if matches(kind, candidate)), None)


def _alike(value: Toml) -> Iterator[Toml]:
    if isinstance(value, str):
        with suppress(ValueError):
            # In lower case, as Python's "True" was meant as true.
            yield from tomllib.loads(f"value = {value.lower()}").values()
    elif isinstance(value, float) and value.is_integer():
        yield int(value)
    if isinstance(value, list):
        yield from value if len(value) == 1 else ()
    elif not isinstance(value, dict):
        if not isinstance(value, str):
            yield as_toml(value)
        yield [value]
