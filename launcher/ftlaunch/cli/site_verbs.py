"""Verbs that take a cluster."""

from typing import Annotated

import typer

from ftlaunch.cli import text
from ftlaunch.cli.options import Json
from ftlaunch.errors import BAD_INPUT, DONE


def doctor(
    cluster: Annotated[str, typer.Option("--cluster", metavar="NAME", help="A profile's file, or its name.")],
    nodes: Annotated[int, typer.Option("--nodes", min=1, metavar="N", help="Look at so many nodes.")] = 2,
    json: Json = False,
) -> None:
    """Check whether a SLURM cluster is fit for runs.

    Example: ftlaunch doctor --cluster dev
    """
    from ftlaunch.backend.doctor import examine
    from ftlaunch.sites import load_cluster

    checks = list(examine(load_cluster(cluster), nodes))
    rows = [("pass" if each.passed else "FAIL", each.what, each.found, each.remedy) for each in checks]
    print(text.as_json(checks) if json else text.table(("", "check", "found", "remedy"), rows))
    raise typer.Exit(DONE if all(each.passed for each in checks) else BAD_INPUT)
