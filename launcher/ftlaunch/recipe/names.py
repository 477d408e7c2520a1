"""The one rule that tells a path of this machine from an id of the hub, for models and data sets.

A name is settled once, where a person writes it, and by its text:

- `OWNER/NAME` and `NAME` have the form of a hub id. `OWNER/NAME` is one, whatever is here; the user is told where a
  folder has that name. `NAME` is refused where something here has that name, as either could be meant, and both can be
  written in full: `./NAME` and `OWNER/NAME`.
- All else is a path: with `./`, `../`, `/` or `~/` at its start, with more than one slash, with an ending of files, or
  with a character that no hub id has. It counts from the recipe's folder, in `--set` and on the command line from the
  working directory, and becomes absolute.

From then on the settled form alone decides (`is_local`), in the launcher, in run folders and in the trainer: no working
directory turns a hub id into a folder.
"""

import os
import re
from pathlib import Path

from ftlaunch.errors import UserError

LOCAL_STARTS = ("./", "../", "/", "~")
KINDS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt", ".parquet", ".arrow")
"""Endings of data files."""
PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Endings of compressed ones, after the ending that tells their kind."""
LOCAL_ENDINGS = (*KINDS, *PACKED, ".gguf", ".jinja", ".safetensors")
HUB_ID = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]*")


def is_local(settled: str) -> bool:
    """Whether a settled name is a path of this machine; else it is a hub id."""
    return Path(settled).is_absolute()


def holds(settled: str, file: str) -> bool:
    """Whether a settled name is a folder here with such a file in it; a hub id holds nothing, whatever is here."""
    return is_local(settled) and (Path(settled) / file).exists()


def has_form_of_id(text: str) -> bool:
    """Whether a name has the form of a hub id: `OWNER/NAME` or `NAME`."""
    return HUB_ID.fullmatch(text) is not None and not text.endswith(LOCAL_ENDINGS)


def settle(text: str, folder: Path, noun: str) -> str:
    """The hub id as it is, or the absolute path, which counts from `folder`. UserError where it is neither.

    `noun` is what a path may name, such as "a file or folder".
    """
    path = existing(text, folder)
    if has_form_of_id(text):
        if path is not None and "/" not in text:
            message = f'"{text}" could be {path} or a hub id'
            raise UserError(message, f"write ./{text} for what is here, or the hub id with its owner: OWNER/{text}")
        return text
    if path is not None:
        return str(path)
    if text.startswith(LOCAL_STARTS) or text.endswith(LOCAL_ENDINGS) or text.count("/") > 1:
        raise UserError(f"there is no {absolute(text, folder)}", f"correct the path, or name {noun} that exists")
    message = f'"{text}" names nothing in {folder} and cannot be a hub id, which is owner/name or name'
    raise UserError(message, f"correct the hub id, or begin the path to {noun} with ./")


def namesake(settled: str, folder: Path) -> str | None:
    """What the user is told of something here that is called like a hub id; None where nothing is."""
    if is_local(settled) or existing(settled, folder) is None:
        return None
    return f"{settled} is a hub id; what is here has to be written ./{settled}"


def label(settled: str) -> str:
    """A settled name as people are shown it: an id, or a path from the working directory if it lies below that."""
    path = Path(settled)
    return os.path.relpath(path) if is_local(settled) and path.is_relative_to(Path.cwd()) else settled


def existing(text: str, folder: Path) -> Path | None:
    """The absolute path of what the text names on this machine. A link keeps its name, as that tells the format."""
    path = absolute(text, folder)
    try:
        if not path.exists():
            return None
        return path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    # Such as a folder that its owner alone may enter.
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "correct the path or its permissions") from None


def absolute(text: str, folder: Path) -> Path:
    """The path that the text stands for where relative ones count from `folder`; `~/` is the user's home."""
    return Path.home() / text[2:] if text.startswith("~/") else folder / text
