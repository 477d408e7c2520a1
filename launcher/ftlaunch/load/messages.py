"""A recipe's types and values in a user's words."""

import difflib
import json
import re
from collections.abc import Iterable
from datetime import date, time
from typing import cast

import msgspec.inspect as types

from ftlaunch.load.origins import Toml


def expected(kind: types.Type) -> str:
    """What a value of this type looks like: "a number above 0"."""
    match kind:
        case types.BoolType():
            return "true or false"
        case types.LiteralType():
            return join_or(as_toml(value) for value in kind.values)
        case types.IntType() | types.FloatType():
            return _number(kind)
        case types.StrType():
            return _text(kind)
        case types.Metadata():
            # Each type with a pattern has a description of it, since no user reads patterns.
            schema = cast("dict[str, str]", kind.extra_json_schema or {})  # pyright: ignore[reportUnknownMemberType]
            return _text(cast("types.StrType", kind.type), schema.get("description", "text"))
        case types.TupleType():
            return f"a list of {len(kind.item_types)}: {', '.join(map(expected, kind.item_types))}"
        case types.ListType():
            return f"a list, each {expected(kind.item_type)}"
        case types.UnionType():
            members = [member for member in kind.types if not isinstance(member, types.NoneType)]
            return join_or(dict.fromkeys(map(expected, members)))
        case _:
            return "a table"


def _number(kind: types.IntType | types.FloatType) -> str:
    noun = "a whole number" if isinstance(kind, types.IntType) else "a number"
    least, above = kind.ge, kind.gt
    if isinstance(kind, types.IntType) and least == 1:
        least, above = None, 0
    most = f"below {kind.lt:g}" if kind.lt is not None else f"at most {kind.le:g}" if kind.le is not None else ""
    if above is not None:
        return f"{noun} above {above:g}{most and ' and '}{most}"
    if least is None:
        return f"{noun} {most}".rstrip()
    return f"{noun} from {least:g} {'to ' if most else 'up'}{most.removeprefix('at most ')}"


def _text(kind: types.StrType, words: str = "text") -> str:
    if kind.max_length is not None:
        words += f", of at most {kind.max_length} characters"
    return words


def quote(value: Toml) -> str:
    """The value as a message quotes it, short and on one line."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return repr(value if len(value) <= 60 else f"{value[:57]}...")
        case dict():
            return "a table"
        case list():
            return f"a list of {len(value)}" if value else "an empty list"
        case date() | time():
            return f"the date or time {value}"
        case _:
            return as_toml(value)


def as_toml(value: object) -> str:
    """The value as TOML writes it."""
    # repr writes inf and nan as TOML does; JSON has Infinity and NaN.
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, date | time):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def join_or(options: Iterable[str]) -> str:
    """`a, b or c`."""
    *rest, last = options
    return f"{', '.join(rest)} or {last}" if rest else last


def closest(word: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The known word that was probably meant; initials count, as `lr` for `learning_rate`."""
    options = {option.lower().replace("-", "_"): option for option in known}
    plain = re.sub(r"[\s-]+", "_", word.lower())
    for simple, option in options.items():
        # A single letter would be the initial of every word without "_" that begins with it.
        if len(plain) > 1 and plain == "".join(part[:1] for part in simple.split("_")):
            return option
    found = difflib.get_close_matches(plain, options, n=1, cutoff=likeness)
    return options[found[0]] if found else None


SYNONYMS = {"gpu": "cuda"}
"""Words that people use for others that look nothing like them."""


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """A remedy: the word that was probably meant, else `otherwise`."""
    options = [*known]
    synonym = SYNONYMS.get(word)
    meant = synonym if synonym in options else closest(word, options)
    return f"did you mean {as_toml(meant)}?" if meant else otherwise
