"""Verbs that take a recipe. What they need is imported when they are called: startup time is a feature."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ftlaunch.cli import text, trainer
from ftlaunch.cli.options import (
    After,
    ClusterName,
    Detach,
    Json,
    Nodes,
    ProcsPerNode,
    RecipeName,
    RunFolder,
    Settings,
    Site,
    all_settings,
)
from ftlaunch.cli.profile import for_recipe, load_named
from ftlaunch.errors import UserError

if TYPE_CHECKING:
    from ftlaunch.cluster.vocabulary import Cluster
    from ftlaunch.plan.plan import Plan
    from ftlaunch.rules import Loaded
    from ftlaunch.run.layout import RunDir


def _load(recipe: str, settings: list[str]) -> "Loaded":
    from ftlaunch import rules
    from ftlaunch.load import catalog

    loaded = rules.load_and_check(catalog.find_recipe(recipe), settings)
    for remark in loaded.remarks:
        print(remark, file=sys.stderr)
    return loaded


def _plan(loaded: "Loaded", run_dir: Path | None, *, here: bool) -> "Plan":
    """The plan of one run; with `here` it is for this machine, and says what that makes of it."""
    from ftlaunch.plan import machine
    from ftlaunch.plan.plan import make_plan
    from ftlaunch.watch import runs

    if loaded.recipe.sweep is not None:
        message = f"{loaded.source.name} has a [sweep] table: it is several runs, not one"
        raise UserError(message, f"run them all: ftlaunch compare {loaded.source}")
    folder = (run_dir or runs.HOME / loaded.recipe.name).absolute()
    if not str(folder).isprintable():  # a line break would end a line of a batch script, and begin a command
        raise UserError(f"{str(folder)!r} holds control characters", "choose another folder with --run-dir")
    return make_plan(loaded.recipe, folder, machine.look() if here else None)


def _show(plan: "Plan", cluster: "Cluster | None", *, json: bool = False) -> str:
    """A plan in full, with what SLURM is asked for where it is for a cluster."""
    if cluster is None:
        return text.as_json(plan) if json else text.full(plan)
    from ftlaunch.backend.slurm.carried import carried, not_heeded
    from ftlaunch.backend.slurm.request import request

    requests = {planned.name: request(plan, planned, cluster) for planned in plan.stages}
    variables = carried() | cluster.environment
    if (said := not_heeded()) is not None:
        print(f"warning: {said}", file=sys.stderr)
    if json:
        return text.as_json({"plan": plan, "requests": requests, "variables": variables})
    return text.full(plan, requests, variables)


def _show_sweep(loaded: "Loaded", settings: list[str], *, json: bool) -> str:
    """The first variant of a sweep in a summary, and of the others what differs from it."""
    from ftlaunch.compare import variants

    found = variants.variants([loaded.source], settings)
    plans = {trial.variant: trial.plan for trial in variants.trials(found, 1, variants.home(loaded.source))}
    if json:
        return text.as_json({variant.label: plan for variant, plan in plans.items()})
    own = len(settings)  # a variant's settings follow those of the command line
    named = {f"{variant.label}: {', '.join(variant.settings[own:])}": plan for variant, plan in plans.items()}
    return f"{len(found)} runs, by: ftlaunch compare {loaded.source}\n\n{text.variants(named)}"


def run(
    recipe: RecipeName,
    settings: Settings = None,
    nodes: Nodes = None,
    procs_per_node: ProcsPerNode = None,
    cluster: ClusterName = None,
    site: Site = None,
    after: After = None,
    run_dir: RunFolder = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan, like ftlaunch plan.")] = False,
    begin_from: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Begin an existing run anew at this stage.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what --from makes obsolete without asking.")] = False,
    detach: Detach = False,
) -> None:
    """Run a recipe; Ctrl-C saves and stops.

    Example: ftlaunch run my.toml --set stage.0.epochs=1 --detach
    """
    from ftlaunch.backend.prepare import prepare
    from ftlaunch.cli.run import dependency, require_here, start

    loaded = _load(recipe, all_settings(settings, nodes, procs_per_node))
    profile = for_recipe(loaded.recipe, cluster, site)
    planned = _plan(loaded, run_dir, here=profile is None)
    if dry_run:
        print(_show(planned, profile))
        return
    if profile is None:
        require_here(planned)
    else:
        from ftlaunch.backend.slurm import submit

        submit.require_fit(planned, profile)
    waited_for = dependency(after, on_cluster=profile is not None)
    print(text.summary(planned), file=sys.stderr)
    if begin_from is None:
        folder = prepare(planned, loaded, profile)
    else:
        folder = _begin_anew(planned, loaded, profile, begin_from, yes=yes)
    raise typer.Exit(start(folder, detach=detach, fresh=begin_from is None, after=waited_for))


def _begin_anew(planned: "Plan", loaded: "Loaded", cluster: "Cluster | None", stage: str, *, yes: bool) -> "RunDir":
    """The run's folder without the stages that are done anew, once the user agrees."""
    from ftlaunch.backend import rerun
    from ftlaunch.watch import runs

    run = runs.find(planned.run_dir)
    removed = rerun.obsolete_stages(run, planned, stage)
    what = f"{', '.join(removed)} of {run.path}"
    if removed and not yes:
        if not sys.stdin.isatty():
            raise UserError(f"--from removes {what}", "add --yes if that is meant")
        typer.confirm(f"This removes {what}. Go on?", abort=True, err=True)
    rerun.rerun_from(run, planned, loaded, cluster, removed)
    return run


def plan(
    recipe: RecipeName,
    settings: Settings = None,
    nodes: Nodes = None,
    procs_per_node: ProcsPerNode = None,
    cluster: ClusterName = None,
    site: Site = None,
    run_dir: RunFolder = None,
    json: Json = False,
) -> None:
    """Show what a run would do, in full.

    Example: ftlaunch plan my.toml --procs-per-node 2
    """
    asked = all_settings(settings, nodes, procs_per_node)
    loaded = _load(recipe, asked)
    profile = for_recipe(loaded.recipe, cluster, site)
    if loaded.recipe.sweep is not None:
        print(_show_sweep(loaded, asked, json=json))
        return
    print(_show(_plan(loaded, run_dir, here=profile is None), profile, json=json))


def validate(
    recipe: RecipeName,
    settings: Settings = None,
    nodes: Nodes = None,
    procs_per_node: ProcsPerNode = None,
) -> None:
    """Check a recipe and the data it names.

    Example: ftlaunch validate my.toml
    """
    asked = all_settings(settings, nodes, procs_per_node)
    loaded = _load(recipe, asked)
    if loaded.recipe.sweep is not None:
        from ftlaunch.compare import variants

        found = variants.variants([loaded.source], asked)
        variants.trials(found, 1, Path())
        print(f"{loaded.source.name}: ok — {', '.join(variant.label for variant in found)}")
        return
    steps = _plan(loaded, None, here=False).stages
    stages = ", ".join(planned.name.partition("-")[2] for planned in steps)
    count = max(planned.spec.world_size for planned in steps)
    print(f"{loaded.source.name}: ok — {stages} on {text.processes(count)}")
    for planned in steps:
        if (layout := planned.notes.get("layout")) is not None:
            print(f"{planned.name}: {layout}")


def recipes(json: Json = False) -> None:
    """List the recipes that come with ftlaunch.

    Example: ftlaunch recipes
    """
    from ftlaunch.load import catalog

    found = {name: catalog.description(path) for name, path in catalog.shipped_recipes().items()}
    print(text.as_json(found) if json else text.table(("recipe", "what it does"), list(found.items())))


def schema() -> None:
    """Print the JSON Schema of a recipe.

    Example: ftlaunch schema > recipe.schema.json
    """
    from ftlaunch.recipe.schema import json_schema

    print(text.as_json(json_schema()))


def preview(
    recipe: RecipeName,
    rows: Annotated[int, typer.Option("--rows", min=1, metavar="N", help="Rows of each data set.")] = 2,
    settings: Settings = None,
    cluster: ClusterName = None,
    site: Site = None,
) -> None:
    """Show data as the model will see it.

    Example: ftlaunch preview my.toml --rows 3
    """
    profile = load_named(cluster, site)
    loaded = _load(recipe, settings or [])
    raise typer.Exit(trainer.call_on(loaded.recipe, "fttrain.tools.preview", "--rows", str(rows), cluster=profile))
