"""The verb that runs variants and sets them side by side."""

from pathlib import Path
from typing import Annotated

import typer

from ftlaunch.cli import text, trainer
from ftlaunch.cli.options import Json, Settings
from ftlaunch.errors import DONE

Recipes = Annotated[
    list[str],
    typer.Argument(metavar="RECIPE…", help="Recipe files or names of shipped ones; the first is the measure."),
]
Seeds = Annotated[int, typer.Option("--seeds", min=1, metavar="N", help="Runs of each variant, seed by seed.")]
Folder = Annotated[
    Path | None, typer.Option("--dir", metavar="DIR", help="Where the runs are. Default: ./comparisons/NAME.")
]


def compare(
    recipe: Recipes, seeds: Seeds = 1, settings: Settings = None, folder: Folder = None, json: Json = False
) -> None:
    """Run recipes, or a recipe's [sweep], and compare them.

    Example: ftlaunch compare lora.toml dora.toml --seeds 3 --set stage.0.steps=50
    """
    from ftlaunch.compare import table, variants
    from ftlaunch.compare.measures import measure
    from ftlaunch.compare.runner import conduct
    from ftlaunch.load import catalog
    from ftlaunch.run.layout import RunDir

    paths = [catalog.find_recipe(name) for name in recipe]
    found = variants.variants(paths, settings or [])
    where = (folder or Path("comparisons") / paths[0].stem).absolute()
    trials = variants.trials(found, seeds, where)
    trainer.require()
    code = conduct(trials)
    if code != DONE:
        raise typer.Exit(code)
    runs = [[trial.plan.run_dir for trial in trials if trial.variant is variant] for variant in found]
    measured = [[measure(RunDir(Path(path))) for path in of_variant] for of_variant in runs]
    rows = table.rows([variant.label for variant in found], runs, measured)
    print(text.as_json(rows) if json else text.table(*table.head_and_lines(rows)))
