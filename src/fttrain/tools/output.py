"""How a tool is called and answers: stdout holds its answer and nothing else, stderr what is wrong with its remedy."""

import contextlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import msgspec

from ftlaunch.errors import BAD_INPUT, DONE, UserError
from ftlaunch.tools import ToolOptions

Options = TypeVar("Options", bound=ToolOptions)


def called_with(kind: type[Options]) -> Options:
    """The options in the file that the command line of this process names."""
    return msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=kind)


def answer(parts: Iterable[str]) -> int:
    """Print the parts of an answer as they are made; the exit code. What libraries print meanwhile goes to stderr."""
    stdout = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            for part in parts:
                print(part, file=stdout, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return DONE
