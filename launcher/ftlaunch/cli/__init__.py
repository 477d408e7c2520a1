"""The command line: verbs, their options, and the one place where a user's mistake becomes an exit code."""

import errno
import os
import sys
from collections.abc import Iterable
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path

import typer

from ftlaunch import __version__
from ftlaunch.errors import BAD_INPUT, UserError
from ftlaunch.safety import trust
from ftlaunch.safety.redact import redact_output

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""A full disk, a quota that is used up, a disk that may only be read: nothing that a traceback would explain."""
DENIED = (errno.EACCES, errno.EPERM)

# --help lists verbs in this order: everyday ones first.
VERBS = {
    **{"run": "recipe.run", "plan": "recipe.plan", "validate": "recipe.validate", "preview": "preview.preview"},
    **{"compare": "compare.compare", "recipes": "recipe.recipes", "schema": "recipe.schema"},
    **{"status": "run.status", "logs": "run.logs", "stop": "run.stop", "cancel": "run.cancel", "resume": "run.resume"},
    **{"attach": "cluster.attach", "watch": "watch.watch", "report": "report.report"},
    **{"merge": "model.merge", "chat": "model.chat", "serve": "model.serve", "push": "ship.push"},
    **{"export": "ship.export", "eval": "evaluate.evaluate", "quantize": "model.quantize"},
    **{"superweights": "model.superweights", "doctor": "cluster.doctor", "import": "model.import_model"},
    "drive": "run.drive",
}
"""Each verb, with its module in this package and its function there."""
HIDDEN = ("drive",)
"""What ftlaunch itself calls."""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ftlaunch {__version__}")
        raise typer.Exit


def app(verbs: Iterable[str] = VERBS) -> typer.Typer:
    """The command line with some of its verbs: each that is left out saves its imports and typer's look at it."""
    made = typer.Typer(
        add_completion=False,
        # rich would take the brackets of [sweep] in a help text for markup, and hide most frames of a traceback.
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        callback=ftlaunch,
    )
    for verb in verbs:
        module, _, name = VERBS[verb].partition(".")
        function = getattr(import_module(f"{__name__}.{module}"), name)
        made.command(verb, hidden=verb in HIDDEN)(function)
    return made


def ftlaunch(
    _version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Fine-tune language models from a recipe.

    A first run: ftlaunch recipes, then ftlaunch run RECIPE.
    """


def main() -> None:
    """Run the command line; a UserError is printed to stderr and ends it with its exit code. No secret is printed."""
    _mend_streams()
    # Before any verb: everything printed from here on, tracebacks included, passes through the filter for secrets.
    redact_output()
    trust.write_for_ourselves()
    try:
        _require_working_directory()
        try:
            asked = sys.argv[1:2]
            # What is no verb, an option or a slip of the pen, is for typer, which knows all of them.
            app(asked if VERBS.keys() & asked else VERBS)(prog_name="ftlaunch")
        finally:
            sys.stdout.flush()  # here a full disk is an error like any other, and at the interpreter's end a traceback
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno in DENIED and error.filename:
            remedy = "you may not use it so: ask its owner, or have its permissions changed"
            print(f"error: {error.filename}: {error.strerror}\n  → {remedy}", file=sys.stderr)
            sys.exit(BAD_INPUT)
        if error.errno not in NO_ROOM:
            raise
        where = error.filename or "what this call has to write down"
        print(f"error: {where} cannot be written: {error.strerror}\n  → make room, or mend the disk", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still to be flushed to stdout would fail once more
        sys.exit(BAD_INPUT)


def _mend_streams() -> None:
    """Let what is printed go nowhere where a stream is closed, and as escapes where it cannot be encoded."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 it is open until the end
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _require_working_directory() -> None:
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise UserError("the working directory is gone", "go to one that is there: cd") from error
