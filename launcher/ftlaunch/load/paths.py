"""What a `path` of a recipe names: something on this machine, made absolute, or a name on the hub."""

import glob
import re
from collections.abc import Iterator, Mapping, Set
from copy import deepcopy
from pathlib import Path
from typing import Any

from ftlaunch.errors import Problem, UserError
from ftlaunch.load.messages import as_toml, closest, join_or
from ftlaunch.load.origins import KeyPath, SourceMap, Toml, dotted
from ftlaunch.recipe import METRICS

# ("stage", ANY, "model", "path") stands for stage[0].model.path, stage[1].model.path, …
ANY = "*"
MODELS = (("model", "path"), ("stage", ANY, "model", "path"), ("stage", ANY, "reward_model"))
FUNCTIONS = (("stage", ANY, "reward_function"),)
DATA = (("data", ANY, "path"),)
EVALUATION = (("data", ANY, "eval"),)
TEMPLATES = (("data", ANY, "template"),)
METRICS_OF_STAGES = (("stage", ANY, "metrics", ANY), ("stage", ANY, "eval_metrics", ANY))

PINNED = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+@[0-9a-f]{40}")
TEMPLATE_WORDS = ("tokenizer", "llama2", "chatml", "none")
LOCAL_STARTS = ("./", "../", "/", "~")
LOCAL_ENDINGS = (
    *(".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt", ".parquet", ".arrow"),
    *(".gz", ".bz2", ".xz", ".zst", ".gguf", ".jinja", ".safetensors"),
)
HUB_ID = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]*")


def is_file(path: Path) -> bool:
    """Whether there is such a file; not where the file system takes no such path, as of one that is too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def settle(values: dict[str, Toml], where: SourceMap, judged: Set[str]) -> tuple[dict[str, Toml], list[Problem]]:
    """The tables with absolute local paths, and what is wrong with those that name nothing; `judged` keys are left."""
    settled = deepcopy(values)
    problems: list[Problem] = []
    kinds = ((MODELS, _model), (DATA, _data), (EVALUATION, _evaluation), (TEMPLATES, _template), (FUNCTIONS, _function))
    for patterns, settle_one in (*kinds, (METRICS_OF_STAGES, _metric)):
        for path, holder, text in _texts(settled, patterns):
            if dotted(path) in judged:
                continue
            try:
                holder[path[-1]] = settle_one(text, where.origin(path).folder)
            except UserError as error:
                problems.append(Problem(where(path), dotted(path), error.message, error.remedy))
    return settled, problems


def _texts(values: dict[str, Toml], patterns: tuple[KeyPath, ...]) -> Iterator[tuple[KeyPath, Any, str]]:
    """Each text that a pattern leads to, with its path and the table or list that holds it."""
    for pattern in patterns:
        for path, holder in _holders(values, pattern[:-1], ()):
            for key, text in list(_children(holder).items()):
                if pattern[-1] in (ANY, key) and isinstance(text, str):
                    yield (*path, key), holder, text


def _holders(node: Toml, pattern: KeyPath, path: KeyPath) -> Iterator[tuple[KeyPath, Toml]]:
    if not pattern:
        yield path, node
        return
    for key, child in _children(node).items():
        if pattern[0] in (ANY, key):
            yield from _holders(child, pattern[1:], (*path, key))


def _children(node: Toml) -> Mapping[str | int, Toml]:
    """What a table or a list holds, by key or index."""
    if isinstance(node, list):
        return dict(enumerate(node))
    return {**node} if isinstance(node, dict) else {}


def _model(text: str, folder: Path) -> str:
    if text.endswith(".gguf"):
        message = f"{as_toml(text)} is a GGUF file, which cannot be trained"
        raise UserError(message, f"turn it into a folder with `ftlaunch import {text} DIR` and name DIR here")
    found = _local_or_hub(text, folder, "a folder with safetensors")
    if Path(found).is_file():
        raise UserError(f"expected a folder or a hub id, but {found} is a file", "name the folder that holds it")
    return found


def _data(text: str, folder: Path) -> str:
    pattern = str(_absolute(text, folder))
    # "facts[1].jsonl" may be the name of a file.
    if glob.has_magic(text) and not Path(pattern).exists():
        if next(glob.iglob(pattern, recursive=True), None) is None:  # noqa: PTH207 absolute
            raise UserError(f"nothing matches {pattern}", "correct the pattern, or name a file or folder")
        return pattern
    return _local_or_hub(text, folder, "a file or folder")


def _evaluation(text: str, folder: Path) -> str:
    """A file or folder, or the name of a split as it is."""
    if "/" in text or text.endswith(LOCAL_ENDINGS):
        return _local_only(text, folder)
    return text


def _local_only(text: str, folder: Path) -> str:
    found = _data(text, folder)
    if found == text and not Path(text).is_absolute():
        raise UserError(f"there is no {_absolute(text, folder)}", "name a split, or a file or folder that exists")
    return found


def _function(text: str, folder: Path) -> str:
    """FILE.py:NAME with the file's absolute path; whatever names no file as it is."""
    place, _, name = text.rpartition(":")
    if not place.endswith(".py"):
        return text
    if (path := _existing(place, folder)) is None:
        raise UserError(f"there is no {_absolute(place, folder)}", "correct the path: FILE.py:NAME")
    return f"{path}:{name}"


def _metric(text: str, folder: Path) -> str:
    """A shipped metric or one of the hub as it is; the absolute path of a file, of a folder the file named like it."""
    if text in METRICS:
        return text
    if (path := _existing(text, folder)) is not None:
        module = path / f"{path.name}.py" if path.is_dir() else path
        if module.suffix != ".py" or not module.is_file():
            raise UserError(f"there is no metric in {path}", "name a .py file, or a folder NAME with NAME.py in it")
        return str(module)
    if PINNED.fullmatch(text):
        return text
    meant = closest(text, METRICS)
    if HUB_ID.fullmatch(text.partition("@")[0]) and "/" in text:
        message = f"{as_toml(text)} is a program of the hub that could change"
        raise UserError(message, "pin it to a full commit: owner/name@COMMIT (40 hex digits)")
    remedy = f"did you mean {as_toml(meant)}?" if meant else f"name {join_or(METRICS)}, a file, or a folder"
    raise UserError(f"there is no metric {as_toml(text)}", remedy)


def _template(text: str, folder: Path) -> str:
    if text in TEMPLATE_WORDS:
        return text
    if (path := _existing(text, folder)) is not None:
        return str(path)
    words = join_or(map(as_toml, TEMPLATE_WORDS))
    meant = closest(text, TEMPLATE_WORDS)
    remedy = f"did you mean {as_toml(meant)}?" if meant else "correct the path or write one of the words"
    raise UserError(f"expected {words} or a Jinja file, and there is no file {_absolute(text, folder)}", remedy)


def _local_or_hub(text: str, folder: Path, noun: str) -> str:
    if (path := _existing(text, folder)) is not None:
        return str(path)
    # A hub id has at most one slash.
    if text.startswith(LOCAL_STARTS) or text.endswith(LOCAL_ENDINGS) or text.count("/") > 1:
        raise UserError(f"there is no {_absolute(text, folder)}", f"correct the path, or name {noun} that exists")
    if not HUB_ID.fullmatch(text):
        message = f"{as_toml(text)} names nothing in {folder} and cannot be a hub id, which is owner/name or name"
        raise UserError(message, f"correct the hub id, or begin the path to {noun} with ./")
    return text


def _existing(text: str, folder: Path) -> Path | None:
    """The absolute path of what the text names on this machine. A link keeps its name, as that tells the format."""
    path = _absolute(text, folder)
    try:
        if not path.exists():
            return None
        return path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    # Such as a folder that its owner alone may enter.
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "correct the path or its permissions") from None


def _absolute(text: str, folder: Path) -> Path:
    return Path.home() / text[2:] if text.startswith("~/") else folder / text
