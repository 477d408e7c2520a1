"""The command line: verbs, their options, and the one place where a user's mistake becomes an exit code."""

import errno
import sys

import typer

from ftlaunch import __version__
from ftlaunch.cli import cluster, compare, evaluate, model, recipe, report, run, ship, watch
from ftlaunch.errors import BAD_INPUT, UserError
from ftlaunch.safety import trust
from ftlaunch.safety.redact import redact_output

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""A full disk, a quota that is used up, a disk that may only be read: nothing that a traceback would explain."""

app = typer.Typer(
    add_completion=False,
    # rich would take the brackets of [sweep] in a help text for markup, and hide most frames of a traceback.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# --help lists verbs in the order of registration: everyday ones first.
for verb in (recipe.run, recipe.plan, recipe.validate, recipe.preview):
    app.command()(verb)
app.command()(compare.compare)
for verb in (recipe.recipes, recipe.schema):
    app.command()(verb)
for verb in (run.status, run.logs, run.stop, run.cancel, run.resume):
    app.command()(verb)
app.command()(cluster.attach)
for verb in (watch.watch, report.report):
    app.command()(verb)
for verb in (model.merge, model.chat, model.serve):
    app.command()(verb)
for verb in (ship.push, ship.export):
    app.command()(verb)
app.command("eval")(evaluate.evaluate)
for verb in (model.quantize, model.superweights, cluster.doctor):
    app.command()(verb)
app.command("import")(model.import_model)
app.command(hidden=True)(run.drive)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ftlaunch {__version__}")
        raise typer.Exit


@app.callback()
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
    # Before any verb: everything printed from here on, tracebacks included, passes through the filter for secrets.
    redact_output()
    trust.write_for_ourselves()
    try:
        app(prog_name="ftlaunch")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        where = error.filename or "what this call has to write down"
        print(f"error: {where} cannot be written: {error.strerror}\n  → make room, or mend the disk", file=sys.stderr)
        sys.exit(BAD_INPUT)
