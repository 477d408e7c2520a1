"""The command line: verbs, their options, and the one place where a user's mistake becomes an exit code."""

import sys

import typer

from ftlaunch import __version__, trust
from ftlaunch.cli import compare_verb, eval_verb, model_verbs, recipe_verbs, run_verbs, site_verbs
from ftlaunch.errors import BAD_INPUT, UserError
from ftlaunch.redact import redact_output

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for verb in (recipe_verbs.run, recipe_verbs.plan, recipe_verbs.validate, recipe_verbs.preview):
    app.command()(verb)
app.command()(compare_verb.compare)
for verb in (recipe_verbs.recipes, recipe_verbs.schema):
    app.command()(verb)
for verb in (run_verbs.status, run_verbs.logs, run_verbs.stop, run_verbs.cancel, run_verbs.resume):
    app.command()(verb)
for verb in (model_verbs.merge, model_verbs.chat):
    app.command()(verb)
app.command("eval")(eval_verb.evaluate)
for verb in (model_verbs.quantize, model_verbs.superweights, site_verbs.doctor):
    app.command()(verb)
app.command("import")(model_verbs.import_model)
app.command(hidden=True)(run_verbs.drive)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ftlaunch {__version__}")
        raise typer.Exit


@app.callback()
def ftlaunch(
    _version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
    ),
) -> None:
    """Fine-tune language models from a recipe.

    A first run: ftlaunch recipes, then ftlaunch run RECIPE.
    """


def main() -> None:
    """Run the command line; a UserError is printed to stderr and ends it with exit code 2. No secret is printed."""
    redact_output()
    trust.write_for_ourselves()
    try:
        app(prog_name="ftlaunch")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
