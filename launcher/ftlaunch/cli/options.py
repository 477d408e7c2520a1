"""Arguments and options that several verbs share."""

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import msgspec
import typer

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one: see ftlaunch recipes.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a recipe's key, as in stage.0.epochs=1. May be repeated."),
]
Nodes = Annotated[int | None, typer.Option("--nodes", metavar="N", help="Same as --set parallel.nodes=N.")]
ProcsPerNode = Annotated[
    int | None,
    typer.Option("--procs-per-node", metavar="M", help="Same as --set parallel.procs_per_node=M. One process a GPU."),
]
ClusterName = Annotated[
    str | None, typer.Option("--cluster", metavar="NAME", help="Run on a SLURM cluster: a profile's file, or its name.")
]
Site = Annotated[
    list[str] | None,
    typer.Option(
        "--site", metavar="KEY=VALUE", help="Set a key of the cluster's profile for this call. May be repeated."
    ),
]
After = Annotated[
    str | None,
    typer.Option("--after", metavar="JOB|RUN", help="On a cluster: start once that job, or run, has succeeded."),
]
RunFolder = Annotated[
    Path | None, typer.Option("--run-dir", metavar="DIR", help="The run's folder. Default: ./runs/NAME.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Detach = Annotated[bool, typer.Option("--detach", help="Run in the background and return at once.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name below ./runs.")]
StageName = Annotated[
    str | None, typer.Option("--stage", metavar="STAGE", help="Only this stage: 01-sft, or sft if there is only one.")
]
AttemptNumber = Annotated[
    int | None, typer.Option("--attempt", metavar="N", help="Attempt N of the stage. Default: the latest.")
]


def all_settings(settings: list[str] | None, nodes: int | None, procs_per_node: int | None) -> list[str]:
    """Every setting that was asked for, the short forms spelt out."""
    spelt = {"parallel.nodes": nodes, "parallel.procs_per_node": procs_per_node}
    return [*(settings or []), *(f"{key}={value}" for key, value in spelt.items() if value is not None)]


def defaults(options: type[msgspec.Struct]) -> Any:
    """What a tool goes by where the user says nothing, by its options' names: it stands once, and the help shows it."""
    return SimpleNamespace(**{field.name: field.default for field in msgspec.structs.fields(options)})
