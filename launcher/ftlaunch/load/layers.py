"""The layers of a recipe: what its base says, what the file says, what `--set` says; the later wins."""

import re
import tomllib
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Self, cast

from msgspec import Struct

from ftlaunch.errors import Problem, RecipeError, UserError
from ftlaunch.load.messages import as_toml, join_or
from ftlaunch.load.origins import KeyPath, Source, Toml, dotted
from ftlaunch.load.toml_lines import key_lines, split_key

KIND = "kind"
"""The key that says what a table is. A table of another kind replaces one whole, as its keys would make no sense."""
PATH = "path"
OF_PATH = ("config", "split", "revision")
"""Keys that say more of what stands under `path`; they make no sense for what another path names."""
INSTEAD = {"steps": "epochs", "epochs": "steps"}
"""Keys of which one counts: what is set takes the place of the other that a file gives."""
BASE = "extends"
EXAMPLES = {"--set": "--set stage.0.learning_rate=1e-4", "--site": "--site time_limit=1:00:00"}

# tomllib's messages end with "(at line 3, column 7)", and begin with one of the texts below.
POSITION = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")
SYNTAX_REMEDIES = {
    "Invalid value": 'put text in quotes, as in name = "value"',
    "Cannot overwrite a value": "this key is given twice: keep one",
    "Cannot declare": "this table is given twice: join the two",
    "Expected '=' after a key": "write key = value, and put a key with blanks in quotes",
}


class OfSweep(str):
    """A setting that a recipe's [sweep] gives. Paths in it count from that recipe's folder."""

    __slots__ = ("folder",)

    def __new__(cls, setting: str, folder: Path) -> Self:
        made = super().__new__(cls, setting)
        made.folder = folder
        return made


class Layer(Struct, frozen=True):
    """Tables, and for each of their keys what gave it."""

    values: dict[str, Toml]
    origins: dict[KeyPath, Source]


def read_text(path: Path) -> str:
    """The text of a recipe. Raises RecipeError where it cannot be read."""
    try:
        # Windows' editors may write a byte order mark, which is no TOML.
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RecipeError([Problem(str(path), "", f"cannot be read: {reason}", "name a recipe that exists")]) from None
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text: byte {error.start + 1} is {error.object[error.start]:#04x}"
        raise RecipeError([Problem(str(path), "", message, "save the file as UTF-8")]) from None


def parse(text: str, path: Path) -> Layer:
    """The layer that a file's text makes. Raises RecipeError with file:line where it is not TOML."""
    try:
        values: dict[str, Toml] = tomllib.loads(text)
    except ValueError as error:
        raise RecipeError([_syntax_problem(str(error), text, path)]) from None
    folder = path.absolute().parent
    origins = {key: Source(f"{path}:{line}", folder) for key, line in key_lines(text).items()}
    return Layer(values, origins)


def _syntax_problem(error: str, text: str, path: Path) -> Problem:
    position = POSITION.search(error)
    line = (position and position[1]) or text.count("\n") + 1
    reason = POSITION.sub("", error)
    remedy = next((remedy for start, remedy in SYNTAX_REMEDIES.items() if reason.startswith(start)), None)
    message = f"is not valid TOML: {reason[:1].lower()}{reason[1:]}"
    return Problem(f"{path}:{line}", "", message, remedy or "see https://toml.io for how TOML is written")


def without_null(node: Any) -> Any:
    """JSON as TOML would have it, which has no null: keys that are null are not given."""
    if isinstance(node, dict):
        return {key: without_null(value) for key, value in cast("dict[str, Any]", node).items() if value is not None}
    return [without_null(each) for each in cast("list[Any]", node)] if isinstance(node, list) else node


def merge(base: Layer, over: Layer) -> Layer:
    """Tables merge key by key; any other value, and a table of another kind, replaces what the base has."""
    origins = dict(base.origins)
    values = _merge_tables(base.values, over.values, (), origins)
    return Layer(values, origins | over.origins)


def _merge_tables(
    base: dict[str, Toml], over: dict[str, Toml], path: KeyPath, origins: dict[KeyPath, Source]
) -> dict[str, Toml]:
    merged = dict(base)
    for key, value in over.items():
        before = base.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and not _other_kind(before, value.get(KIND)):
            merged[key] = _merge_tables(before, value, (*path, key), origins)
        else:
            # The keys inside a table that is replaced must not keep their lines in the base.
            _forget((*path, key), origins)
            merged[key] = value
    return merged


def _other_kind(table: dict[str, Toml], kind: Toml | None) -> bool:
    return kind is not None and KIND in table and table[KIND] != kind


def _forget(path: KeyPath, origins: dict[KeyPath, Source]) -> None:
    for key in [key for key in origins if key[: len(path)] == path]:
        del origins[key]


def override(layer: Layer, settings: Sequence[str], option: str = "--set") -> tuple[Layer, list[Problem]]:
    """The layer with each `key.path=value` of an option put in, and what is wrong with those that cannot be."""
    changed = Layer(deepcopy(layer.values), dict(layer.origins))
    problems: list[Problem] = []
    # sorted is stable: of two settings for one key the later one still wins.
    for setting in sorted(settings, key=lambda setting: not _clears(setting)):
        try:
            _set(changed, setting, option)
        except UserError as error:
            problems.append(Problem(f"{option} {setting}", "", error.message, error.remedy))
    return changed, problems


def _clears(setting: str) -> bool:
    """A `kind` or a `path` goes first: it clears keys of its table, and not what another `--set` puts there."""
    return setting.partition("=")[0].strip().endswith((f".{KIND}", f".{PATH}"))


def _set(layer: Layer, setting: str, option: str) -> None:
    name, equals, text = setting.partition("=")
    try:
        # Without "=" the whole text would pass for a key.
        keys = split_key(name if equals else "")
    except ValueError:
        remedy = f"write for example {EXAMPLES[option]}"
        raise UserError("is not of the form key.path=value", remedy) from None
    if keys[0] == BASE:
        raise UserError(f"{BASE} counts only where it stands in a recipe", f"write {BASE} = … in the file")
    folder = setting.folder if isinstance(setting, OfSweep) else Path.cwd()
    _put(layer, _find(layer.values, keys), _value(text), Source(f"{option} {setting}", folder))


def _value(text: str) -> Toml:
    """The text as TOML reads it, else as it is."""
    try:
        parsed: dict[str, Toml] = tomllib.loads(f"value = {text}")
    except ValueError:
        return text
    # A text with a line break can hold a second key: "1\nname = 2".
    return parsed["value"] if len(parsed) == 1 else text


def _find(values: dict[str, Toml], keys: Sequence[str]) -> KeyPath:
    """The keys with elements of lists as indices. Raises UserError where they lead nowhere."""
    path: KeyPath = ()
    node: Toml = values
    for key in keys:
        if isinstance(node, list):
            path = (*path, _index(node, key, path))
            node = node[int(path[-1])]
        elif isinstance(node, dict):
            path = (*path, key)
            # `--set optimizer.eps=…` needs no [optimizer] in the file: _put makes the table.
            node = node.get(key, {})
        else:
            raise UserError(f"{dotted(path)} holds a value and no keys", f"set {dotted(path)} itself")
    return path


def _index(elements: list[Toml], key: str, path: KeyPath) -> int:
    """The place of an element that is named by its place or, where only one has it, by its kind."""
    if key.isdecimal() and int(key) < len(elements):
        return int(key)
    kinds = [element.get(KIND) if isinstance(element, dict) else None for element in elements]
    if kinds.count(key) == 1:
        return kinds.index(key)
    known = [f"{dotted(path)}.{index} ({as_toml(kind)})" for index, kind in enumerate(kinds) if isinstance(kind, str)]
    remedy = f"write {join_or(known)}" if known else f"count from {dotted(path)}.0"
    if kinds.count(key) > 1:
        raise UserError(f"{kinds.count(key)} of {dotted(path)} are of kind {as_toml(key)}", remedy)
    raise UserError(f"{dotted(path)} has no element {as_toml(key)}", remedy)


def _remove(layer: Layer, table: dict[str, Toml], path: KeyPath, keys: Sequence[str]) -> None:
    for key in keys:
        table.pop(key, None)
        _forget((*path, key), layer.origins)


def _make_way(layer: Layer, table: dict[str, Toml], path: KeyPath, value: Toml) -> None:
    """Remove from the table what makes no sense any more once one of its keys has another value."""
    key = str(path[-1])
    if key == KIND and _other_kind(table, value):
        _remove(layer, table, path[:-1], list(table))
    elif key == PATH and table.get(PATH, value) != value:
        _remove(layer, table, path[:-1], OF_PATH)
    elif (other := INSTEAD.get(key)) in table:
        assert other is not None
        if not layer.origins[*path[:-1], other].place.startswith("--"):  # set as well: the rules ask which is meant
            _remove(layer, table, path[:-1], [other])


def _put(layer: Layer, path: KeyPath, value: Toml, origin: Source) -> None:
    node: Toml = layer.values
    for depth, key in enumerate(path[:-1], start=1):
        if isinstance(node, dict):
            node = node.setdefault(str(key), {})
            layer.origins.setdefault(path[:depth], origin)
        elif isinstance(node, list):
            node = node[int(key)]
    if isinstance(node, dict):
        _make_way(layer, node, path, value)
    _forget(path, layer.origins)
    if isinstance(node, dict):
        node[str(path[-1])] = value
    elif isinstance(node, list):
        node[int(path[-1])] = value
    layer.origins[path] = origin
