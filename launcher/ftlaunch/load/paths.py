"""What the texts of a recipe name: something on this machine, made absolute, or something of the hub."""

import glob
import re
from collections.abc import Callable, Iterator, Set
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, cast

import msgspec.inspect as types
from msgspec import Struct, field

from ftlaunch.errors import Problem, UserError
from ftlaunch.load.messages import as_toml, did_you_mean, join_or
from ftlaunch.load.origins import KeyPath, SourceMap, Toml, dotted
from ftlaunch.recipe import names
from ftlaunch.recipe.names import LOCAL_ENDINGS, absolute, existing, has_form_of_id, is_local, namesake
from ftlaunch.recipe.stages import METRICS

PINNED = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+@[0-9a-f]{40}")
TEMPLATE_WORDS = ("tokenizer", "llama2", "chatml", "none")


def is_file(path: Path) -> bool:
    """Whether there is such a file; not where the file system takes no such path, as of one that is too long."""
    try:
        return path.is_file()
    except OSError:
        return False


class Settled(Struct):
    """Tables whose names of things are settled."""

    values: dict[str, Toml]
    problems: list[Problem] = field(default_factory=list[Problem])
    """What is wrong with names of nothing."""
    remarks: list[str] = field(default_factory=list[str])
    """What is here and called like a hub id that was written."""


def settle(form: type[Struct], values: dict[str, Toml], where: SourceMap, judged: Set[str]) -> Settled:
    """Settle each name in the tables of a `form`: its type says what it names. `judged` keys are left."""
    settled = Settled(deepcopy(values))
    for path, holder, text, sort in _named(type_of(form), settled.values, ()):
        if dotted(path) in judged:
            continue
        folder = where.origin(path).folder
        try:
            holder[path[-1]] = SETTLED_BY[sort](text, folder)
            if sort in ("model", "data") and (told := namesake(holder[path[-1]], folder)):
                settled.remarks.append(f"{dotted(path)}: {told}")
        except UserError as error:
            settled.problems.append(Problem(where(path), dotted(path), error.message, error.remedy))
    return settled


@cache
def type_of(form: type[Struct]) -> types.Type:
    """What msgspec tells of a struct and all below it, asked once: a recipe's takes as long as many imports."""
    return types.type_info(form)


def _named(kind: types.Type, value: Any, path: KeyPath, holder: Any = None) -> Iterator[tuple[KeyPath, Any, str, str]]:
    """Each text whose type says what it names, with its path, the table or list that holds it, and what that is."""
    match kind:
        case types.Metadata():
            extra = cast("dict[str, str]", kind.extra or {})  # pyright: ignore[reportUnknownMemberType]
            if isinstance(value, str) and "names" in extra:
                yield path, holder, value, extra["names"]
            yield from _named(kind.type, value, path, holder)
        case types.UnionType():
            for member in kind.types:
                yield from _named(member, value, path, holder)
        case _:
            for key, part in _parts(kind, value):
                yield from _named(part, value[key], (*path, key), value)


def _parts(kind: types.Type, value: Any) -> Iterator[tuple[str | int, types.Type]]:
    """The keys or indices of what a value of this type holds, with their types; none where it is of another type."""
    match kind:
        case types.ListType() if isinstance(value, list):
            yield from ((index, kind.item_type) for index in range(len(cast("list[Any]", value))))
        case types.DictType() if isinstance(value, dict):
            yield from ((key, kind.value_type) for key in cast("dict[str, Any]", value))
        case types.StructType() if isinstance(value, dict) and _is_a(kind, cast("dict[str, Any]", value)):
            yield from ((each.encode_name, each.type) for each in kind.fields if each.encode_name in value)
        case _:
            pass


def _is_a(kind: types.StructType, table: dict[str, Any]) -> bool:
    return kind.tag_field is None or table.get(kind.tag_field) == kind.tag


def _model(text: str, folder: Path) -> str:
    if text.endswith(".gguf"):
        message = f"{as_toml(text)} is a GGUF file, which cannot be trained"
        raise UserError(message, f"turn it into a folder with `ftlaunch import {text} DIR` and name DIR here")
    found = names.settle(text, folder, "a folder with safetensors")
    if is_local(found) and Path(found).is_file():
        raise UserError(f"expected a folder or a hub id, but {found} is a file", "name the folder that holds it")
    return found


def _data(text: str, folder: Path) -> str:
    pattern = str(absolute(text, folder))
    # "facts[1].jsonl" may be the name of a file.
    if glob.has_magic(text) and not Path(pattern).exists():
        if next(glob.iglob(pattern, recursive=True), None) is None:  # noqa: PTH207 absolute
            raise UserError(f"nothing matches {pattern}", "correct the pattern, or name a file or folder")
        return pattern
    return names.settle(text, folder, "a file or folder")


def _evaluation(text: str, folder: Path) -> str:
    """A file or folder, or the name of a split as it is."""
    if not ("/" in text or text.endswith(LOCAL_ENDINGS)):
        return text
    if has_form_of_id(text):  # a split's name has no slash, and rows of another data set are no evaluation of this one
        if (path := existing(text, folder)) is None:
            raise UserError(f"there is no {absolute(text, folder)}", "name a split, or a file or folder that exists")
        return str(path)
    return _data(text, folder)


def _function(text: str, folder: Path) -> str:
    """FILE.py:NAME with the file's absolute path; whatever names no file as it is."""
    place, _, name = text.rpartition(":")
    if not place.endswith(".py"):
        return text
    if (path := existing(place, folder)) is None:
        raise UserError(f"there is no {absolute(place, folder)}", "correct the path: FILE.py:NAME")
    return f"{path}:{name}"


def _metric(text: str, folder: Path) -> str:
    """A shipped metric or one of the hub as it is; the absolute path of a file, of a folder the file named like it."""
    if text in METRICS or PINNED.fullmatch(text):
        return text
    if (path := existing(text, folder)) is not None:
        module = path / f"{path.name}.py" if path.is_dir() else path
        if module.suffix != ".py" or not module.is_file():
            raise UserError(f"there is no metric in {path}", "name a .py file, or a folder NAME with NAME.py in it")
        return str(module)
    if has_form_of_id(text.partition("@")[0]) and "/" in text:
        message = f"{as_toml(text)} is a program of the hub that could change"
        raise UserError(message, "pin it to a full commit: owner/name@COMMIT (40 hex digits)")
    remedy = did_you_mean(text, METRICS, f"name {join_or(METRICS)}, a file, or a folder")
    raise UserError(f"there is no metric {as_toml(text)}", remedy)


def _template(text: str, folder: Path) -> str:
    if text in TEMPLATE_WORDS:
        return text
    if (path := existing(text, folder)) is not None:
        return str(path)
    words = join_or(map(as_toml, TEMPLATE_WORDS))
    remedy = did_you_mean(text, TEMPLATE_WORDS, "correct the path or write one of the words")
    raise UserError(f"expected {words} or a Jinja file, and there is no file {absolute(text, folder)}", remedy)


SETTLED_BY: dict[str, Callable[[str, Path], str]] = {
    "model": _model,
    "data": _data,
    "evaluation": _evaluation,
    "template": _template,
    "function": _function,
    "metric": _metric,
}
"""How a text is settled, by what its type says that it names."""
