"""Verbs that take a cluster."""

import os
import subprocess
import sys
from typing import Annotated

import typer

from ftlaunch.cli import text
from ftlaunch.cli.options import Json, RunName
from ftlaunch.errors import BAD_INPUT, DONE


def doctor(
    cluster: Annotated[str, typer.Option(metavar="NAME", help="A profile's file, or its name.")],
    nodes: Annotated[int, typer.Option(min=1, metavar="N", help="Number of nodes to check.")] = 2,
    exclude_failing: Annotated[
        bool, typer.Option("--exclude-failing", help="Add nodes that fail the check to the profile's `exclude`.")
    ] = False,
    json: Json = False,
) -> None:
    """Check whether a SLURM cluster can run recipes.

    Example: ftlaunch doctor --cluster dev
    """
    from ftlaunch.backend.slurm.doctor import examine
    from ftlaunch.cluster.profiles import exclude, load_cluster

    checks = list(examine(load_cluster(cluster), nodes))
    rows = [("pass" if each.passed else "FAIL", each.what, each.found, each.remedy) for each in checks]
    print(text.as_json(checks) if json else text.table(("", "check", "found", "remedy"), rows))
    failing = sorted({each.node for each in checks if each.node and not each.passed})
    if failing and exclude_failing:
        print(f"{exclude(cluster, failing)} now excludes {', '.join(failing)}", file=sys.stderr)
    raise typer.Exit(DONE if all(each.passed for each in checks) else BAD_INPUT)


def attach(
    run: RunName,
    words: Annotated[list[str] | None, typer.Argument(metavar="[COMMAND]...", help="Default: a shell.")] = None,
    rank: Annotated[int, typer.Option(metavar="K", help="Choose the node of rank K.")] = 0,
) -> None:
    """Open a shell, or run a command, on a node of a running run.

    Example: ftlaunch attach my-run --rank 3 -- nvidia-smi
    """
    from ftlaunch.backend import runs
    from ftlaunch.backend.slurm import paths, queue
    from ftlaunch.backend.slurm.attach import command
    from ftlaunch.cluster.vocabulary import Cluster

    folder = runs.find(run)
    line = command(folder, rank, words or [], terminal=sys.stdin.isatty())
    # Within salloc, the shell's own job has its size there, which srun would take for what is asked of it.
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SRUN_"))}
    # The profile may name a slurm.conf of its own: srun then finds the run's cluster and not the default one.
    cluster = queue.read_cluster(folder) if paths.cluster(folder).exists() else Cluster()  # nodes that are held
    raise typer.Exit(subprocess.call(line, env=variables | queue.environment(cluster)))
