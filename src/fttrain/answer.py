"""How a tool of the trainer answers: stdout holds its answer and nothing else, stderr what is wrong with its remedy."""

import contextlib
import sys
from collections.abc import Callable

from ftlaunch.errors import BAD_INPUT, DONE, UserError


def answer(work: Callable[[], str]) -> int:
    """Print what comes of some work and return the exit code. What libraries print meanwhile goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            said = work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(said)
    return DONE
