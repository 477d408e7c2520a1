"""Where a value of a recipe was written: a file and line, or the `--set` that gave it."""

import json
import re
from collections.abc import Mapping
from datetime import date, time
from pathlib import Path
from typing import TypeAlias

from msgspec import Struct

Toml: TypeAlias = str | int | float | bool | date | time | list["Toml"] | dict[str, "Toml"]
"""A value as tomllib gives it; a datetime is a date."""
KeyPath: TypeAlias = tuple[str | int, ...]
"""`("stage", 0, "learning_rate")`: keys of tables and indices of lists, from the top of the file."""

# What TOML lets a key be without quotes.
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def dotted(path: KeyPath) -> str:
    """The path as a user writes it: `stage[0].learning_rate`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{quoted_key(part)}" for part in path]
    return "".join(parts).removeprefix(".")


def quoted_key(key: str) -> str:
    """The key in quotes where TOML wants them, control characters escaped."""
    return key if BARE_KEY.fullmatch(key) else json.dumps(key, ensure_ascii=False)


class Source(Struct, frozen=True):
    """What gave a value."""

    place: str
    """`file:line` or `--set key=value`."""
    folder: Path
    """Folder that a relative path in the value counts from."""


class SourceMap(Struct, frozen=True):
    """Answers for each key path where it was written."""

    top: Source
    """What stands for the recipe as a whole."""
    origins: Mapping[KeyPath, Source]

    def __call__(self, path: KeyPath) -> str:
        """The place of the key, or of the nearest table around it that was written."""
        return self.origin(path).place

    def origin(self, path: KeyPath) -> Source:
        """What gave the key, or the nearest table around it that was written."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return self.top

    def given(self, path: KeyPath) -> bool:
        """Whether the key was written at all, rather than left to its default."""
        return path in self.origins
