"""The verb that shows what runs have come to."""

from pathlib import Path
from typing import Annotated

import typer

from ftlaunch.cli import text
from ftlaunch.cli.options import Json


def report(
    run: Annotated[list[str], typer.Argument(metavar="RUN…", help="Folders or names of runs, in any state.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the page. Default: RUN/report; of several runs, ./report."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a report of a run, or of several side by side.

    Example: ftlaunch report my-run other-run
    """
    from ftlaunch.backend import runs
    from ftlaunch.report import write

    found = [runs.find(name) for name in run]
    if as_json:
        from ftlaunch.report.facts import read_run

        print(text.as_json([read_run(one) for one in found]))
    elif len(found) == 1:
        print(write.write_report(found[0], out, with_plots=True))
    else:
        print(write.write_overlay(found, (out or Path("report")).absolute()))
