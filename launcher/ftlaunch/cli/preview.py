"""The verb that shows what training will see. Its own file, as its defaults import the options of all tools."""

from typing import Annotated

import typer

from ftlaunch.cli.options import ClusterName, RecipeName, Settings, Site, defaults
from ftlaunch.cli.profile import backend_named
from ftlaunch.cli.recipe import load
from ftlaunch.tools import PreviewOptions

_PREVIEW = defaults(PreviewOptions)


def preview(
    recipe: RecipeName,
    rows: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of rows to show of each data set.")
    ] = _PREVIEW.rows,
    settings: Settings = None,
    cluster: ClusterName = None,
    site: Site = None,
) -> None:
    """Show rows of data as the model will see them.

    Example: ftlaunch preview my.toml --rows 3
    """
    # Not `for_recipe`: a few rows need no cluster, however many nodes the recipe wants.
    backend = backend_named(cluster, site)
    loaded = load(recipe, settings or [])
    raise typer.Exit(backend.call(PreviewOptions(recipe=loaded.recipe, rows=rows)))
