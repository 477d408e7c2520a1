"""The verb that runs variants and sets them side by side."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ftlaunch.cli import text
from ftlaunch.cli.options import ClusterName, Json, Settings, Site
from ftlaunch.cli.profile import backend_named
from ftlaunch.errors import DONE, UserError

Recipes = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE…", help="Recipe files or names of shipped ones; the others are compared with the first."
    ),
]
Seeds = Annotated[
    int, typer.Option("--seeds", min=1, metavar="N", help="Number of runs of each variant, each with its own seed.")
]
Folder = Annotated[
    Path | None, typer.Option("--dir", metavar="DIR", help="Folder of the runs. Default: ./comparisons/NAME.")
]


AtOnce = Annotated[
    int | None,
    typer.Option("--at-once", min=1, metavar="N", help="On a cluster: the most runs at a time. Default: all."),
]


def compare(
    recipe: Recipes,
    seeds: Seeds = 1,
    settings: Settings = None,
    cluster: ClusterName = None,
    site: Site = None,
    at_once: AtOnce = None,
    folder: Folder = None,
    json: Json = False,
) -> None:
    """Run recipes, or a recipe's [sweep], and compare them.

    Example: ftlaunch compare lora.toml dora.toml --seeds 3 --set stage.0.steps=50
    """
    from ftlaunch.compare import table, variants
    from ftlaunch.compare.measures import measure
    from ftlaunch.compare.runner import conduct
    from ftlaunch.load import catalog
    from ftlaunch.run.layout import RunDir

    backend = backend_named(cluster, site)
    if backend.one_by_one and at_once is not None:
        raise UserError("--at-once is for runs on a cluster; here they run one after the other", "leave it out")
    paths = [catalog.find_recipe(name) for name in recipe]
    found = variants.variants(paths, settings or [])
    trials = variants.trials(found, seeds, variants.home(paths[0]) if folder is None else folder.absolute())
    code = conduct(trials, backend, at_once, lambda line: print(line, file=sys.stderr, flush=True))
    # No table of some trials only: it would compare means over different seeds.
    if code != DONE:
        raise typer.Exit(code)
    runs = [[trial.plan.run_dir for trial in trials if trial.variant is variant] for variant in found]
    measured = [[measure(RunDir(Path(path))) for path in of_variant] for of_variant in runs]
    rows = table.rows([variant.label for variant in found], runs, measured)
    print(text.as_json(rows) if json else text.table(*table.head_and_lines(rows)))
