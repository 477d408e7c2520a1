"""Secrets: telling them, and text without them.

A secret is the value of an environment variable whose name says so (as it is, or encoded for a URL, JSON or base64), or
what has the shape of a known kind of token. A recipe has no key for one: the hub's token comes from `hf auth login`.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TextIO, cast

# As long as the shortest secret: a longer one would overwrite what `redact_file` has not read yet.
HIDDEN = "[secret]"
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW(?:OR)?D|PASSPHRASE|CREDENTIAL|KEY", re.IGNORECASE)
HARMLESS_NAME = re.compile(r"(?:_FILE|_PATH|_DIR|_ID|_SOCK)$|^TOKENIZERS_", re.IGNORECASE)
SHORTEST = 8
"""Characters. A shorter value would also hide words that happen to be like it."""

SHAPES = (
    r"\bhf_[A-Za-z0-9]{16,}",
    r"\bsk-[\w-]{16,}",
    r"\bgh[opsur]_[A-Za-z0-9]{16,}",
    r"\bgithub_pat_\w{16,}",
    r"\bglpat-[\w-]{16,}",
    r"\bwandb_v\d_\w{16,}",
    r"\bpypi-[\w-]{16,}",
    r"\bxox[abeoprs]-[\w-]{10,}",
    r"\bAKIA[A-Z0-9]{16}\b",
    r"\bAIza[\w-]{35}",
    r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}",
    r"(?<=://)[^/\s:@]+:[^/\s@]{6,}(?=@)",
    r"(?<=[Bb]earer )[\w.~+/=-]{8,}",
)
"""Tokens of Hugging Face, OpenAI, GitHub, GitLab, Weights & Biases, PyPI, Slack, AWS, Google; a JWT; what a URL or an
HTTP header signs in with."""

SETTING = (
    r"(?P<kept>\b[A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)['\"]?(?:=|: ?))"
    r"(?:'[^'\n]{8,}'|\"[^\"\n]{8,}\"|[^\s'\",;\\]{8,})"
)
"""A variable as a shell sets it, or as Python shows it. Lower case is left alone: an `eos_token` is no secret."""


def redact(text: str) -> str:
    """The text with every secret replaced by "[secret]"."""
    # Only SETTING has the group `kept`: of HF_TOKEN=abc… the name stays readable.
    return pattern().sub(lambda found: f"{found['kept'] or ''}{HIDDEN}", text)


def names_secret(variable: str) -> bool:
    """Whether the name of an environment variable says that its value is secret."""
    return bool(SECRET_NAME.search(variable)) and not HARMLESS_NAME.search(variable)


def has_secret(text: str) -> bool:
    """Return whether a text holds what looks like a token, a key or a password."""
    return pattern().search(text) is not None


def redact_file(path: Path) -> None:
    """Take the secrets out of a file that nobody writes to any more; one without any stays untouched.

    In place, as there may be no room for another: no secret is shorter than what stands for it.
    """
    secret = pattern()
    with path.open("rb") as file:
        if not any(secret.search(_text(line)) for line in file):
            return
        file.seek(0)
        with path.open("r+b") as same:
            same.writelines(redact(_text(line)).encode(errors="surrogateescape") for line in file)
            same.truncate()


def _text(line: bytes) -> str:
    # Bytes that are not UTF-8 come back unchanged when the line is encoded again.
    return line.decode(errors="surrogateescape")


def redact_output() -> None:
    """Take secrets out of all that this process prints from now on, errors included."""
    if not isinstance(sys.stdout, RedactedStream):
        sys.stdout = cast("TextIO", RedactedStream(sys.stdout))
    if not isinstance(sys.stderr, RedactedStream):
        sys.stderr = cast("TextIO", RedactedStream(sys.stderr))


class RedactedStream:
    """A text stream that hands on whole lines, so that a secret written in pieces is seen as one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._held = ""

    def write(self, text: str, /) -> int:
        held = self._held + text
        # "\r" ends a line as well, since a progress bar writes no "\n" until it is full.
        end = max(held.rfind("\n"), held.rfind("\r")) + 1
        self._held = held[end:]
        if end:
            self._stream.write(redact(held[:end]))
        return len(text)

    def flush(self) -> None:
        """Hand on what is held as well: a prompt and a progress bar end in no line end."""
        if self._held:
            self._stream.write(redact(self._held))
            self._held = ""
        self._stream.flush()

    def writelines(self, lines: Iterable[str], /) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> object:
        """Whatever else a stream has, such as `isatty` and `fileno`."""
        return getattr(self._stream, name)


def pattern() -> re.Pattern[str]:
    """What matches a secret, as the environment is now: to be asked once for many texts."""
    return _compiled(frozenset(_values(os.environ)))


def _values(environment: Mapping[str, str]) -> Iterator[str]:
    for name, value in environment.items():
        if len(value) < SHORTEST or not names_secret(name):
            continue
        # API_KEY=/home/me/key.txt names a file, and its path is no secret.
        if not (value.startswith("/") and Path(value).exists()):
            yield value


@lru_cache(maxsize=4)
def _compiled(values: frozenset[str]) -> re.Pattern[str]:
    """Matches the longest form first, so that none leaves a piece of another."""
    forms = sorted({form for value in values for form in _forms(value)}, key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, forms), *SHAPES, SETTING]))


def _forms(value: str) -> Iterator[str]:
    """A value as it is and as JSON, Python, a URL and base64 write it."""
    import json
    from urllib.parse import quote, quote_plus

    yield from (value, json.dumps(value)[1:-1], repr(value)[1:-1], quote(value), quote(value, safe=""))
    yield quote_plus(value)
    yield from _base64_forms(value.encode(errors="surrogateescape"))


def _base64_forms(value: bytes) -> Iterator[str]:
    """The characters that stand for a value and nothing else, wherever in an encoded text it begins."""
    from base64 import b64encode, urlsafe_b64encode

    for before, first in ((0, 0), (1, 2), (2, 3)):  # bytes before it, and characters that they are part of
        # A character stands for 6 bits: the last one may already hold bits of what follows the value, and is left out.
        end = (before + len(value)) * 8 // 6
        for encode in (b64encode, urlsafe_b64encode):
            yield encode(b"\0" * before + value).decode()[first:end]
