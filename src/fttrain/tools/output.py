"""How a tool is called and answers: stdout holds its answer and nothing else, stderr what is wrong with its remedy."""

import contextlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn, TypeVar

import msgspec

from ftlaunch.errors import BAD_INPUT, DONE, UserError
from ftlaunch.tools import ToolOptions

Options = TypeVar("Options", bound=ToolOptions)


def run(tool: Callable[[Options], Iterable[str]], kind: type[Options]) -> NoReturn:
    """Answer to the options in the file that the command line of this process names, and leave with the exit code."""
    sys.exit(answer(tool, msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=kind)))


def answer(tool: Callable[[Options], Iterable[str]], options: Options) -> int:
    """Print the parts of a tool's answer as they are made; return the exit code.

    What libraries print while it is made goes to stderr.
    """
    stdout = sys.stdout
    try:
        parts = tool(options)
        with contextlib.redirect_stdout(sys.stderr):
            for part in parts:
                print(part, file=stdout, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return DONE
