"""Verbs that take a recipe. What they need is imported when they are called: startup time is a feature."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ftlaunch.cli import options, text
from ftlaunch.cli.profile import for_recipe
from ftlaunch.errors import UserError

if TYPE_CHECKING:
    from ftlaunch.backend.protocol import Backend
    from ftlaunch.plan.plan import Plan
    from ftlaunch.rules import Loaded
    from ftlaunch.run.layout import RunDir


def load(recipe: str, settings: list[str]) -> "Loaded":
    """A recipe by name or path, with settings put in, judged; what is remarked on it is printed."""
    from ftlaunch import rules
    from ftlaunch.load import catalog

    loaded = rules.load_and_check(catalog.find_recipe(recipe), settings)
    # On stderr: with --json, a program reads stdout.
    for remark in loaded.remarks:
        print(remark, file=sys.stderr)
    return loaded


def _folder(loaded: "Loaded", run_dir: Path | None = None) -> Path:
    """Where the one run of a recipe goes. UserError where it is several runs, or cannot go there."""
    from ftlaunch.run import HOME

    if loaded.recipe.sweep is not None:
        message = f"{loaded.source.name} has a [sweep] table: it is several runs, not one"
        raise UserError(message, f"run them all: ftlaunch compare {loaded.source}")
    folder = (run_dir or HOME / loaded.recipe.name).absolute()
    if not str(folder).isprintable():  # a line break would end a line of a batch script, and begin a command
        raise UserError(f"{str(folder)!r} holds control characters", "choose another folder with --run-dir")
    return folder


def _show(plan: "Plan", backend: "Backend", *, json: bool = False) -> str:
    """A plan in full, with what its stages cost, and what a scheduler is asked for where there is one."""
    import msgspec

    foreseen = backend.foresee(plan)
    if not json:
        return text.full(plan, foreseen)
    if foreseen.requests:
        jobs = {"requests": foreseen.requests, "variables": foreseen.variables}
        return text.as_json({"plan": plan, **jobs, "costs": foreseen.costs})
    return text.as_json(msgspec.to_builtins(plan) | {"costs": foreseen.costs})


def _show_sweep(loaded: "Loaded", settings: list[str], cluster: str | None, *, json: bool) -> str:
    """The first variant of a sweep in a summary, and of the others what differs from it."""
    from ftlaunch.compare import variants

    found = variants.variants([loaded.source], settings)
    plans = {trial.variant: trial.plan for trial in variants.trials(found, 1, variants.home(loaded.source))}
    if json:
        return text.as_json({variant.label: plan for variant, plan in plans.items()})
    own = len(settings)  # a variant's settings follow those of the command line
    named = {f"{variant.label}: {', '.join(variant.settings[own:])}": plan for variant, plan in plans.items()}
    words = [word for setting in settings for word in ("--set", setting)]
    words += ["--cluster", cluster] if cluster else []
    command = shlex.join(["ftlaunch", "compare", str(loaded.source), *words])
    return f"{len(found)} runs, by: {command}\n\n{text.variants(named)}"


def _calibrate() -> None:
    """Measure this machine, and keep what was found."""
    import msgspec

    from ftlaunch.plan.cost import calibration
    from ftlaunch.processes import trainer

    try:
        measured = calibration.keep(trainer.ask("fttrain.tools.calibrate"))
    # The output is no JSON, or empty: the process failed, and its stderr is on the screen already.
    except msgspec.DecodeError as error:
        raise UserError("the calibration has not said how fast this machine is", "see what it said above") from error
    speeds = ", ".join(f"{word} {rate / 1e12:.3g}" for word, rate in measured.operations_per_second.items())
    print(f"calibrated: {measured.device}, 10¹² operations a second: {speeds}", file=sys.stderr)


def run(
    recipe: options.RecipeName,
    settings: options.Settings = None,
    nodes: options.Nodes = None,
    procs_per_node: options.ProcsPerNode = None,
    cluster: options.ClusterName = None,
    site: options.Site = None,
    after: options.After = None,
    run_dir: options.RunFolder = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan, like ftlaunch plan.")] = False,
    begin_from: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Rerun an existing run from this stage on.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what --from makes obsolete without asking.")] = False,
    detach: options.Detach = False,
) -> None:
    """Run a recipe; Ctrl-C saves a checkpoint and stops.

    Example: ftlaunch run my.toml --set stage.0.epochs=1 --detach
    """
    from ftlaunch.backend.prepare import prepare
    from ftlaunch.cli.run import start

    loaded = load(recipe, options.all_settings(settings, nodes, procs_per_node))
    backend = for_recipe(loaded, cluster, site)
    planned = backend.plan(loaded.recipe, _folder(loaded, run_dir))
    # Before `require`: a plan can also be read where it cannot be started, as on a laptop without SLURM.
    if dry_run:
        print(_show(planned, backend))
        return
    # Everything that can be refused is refused before a folder is written or a stage removed.
    backend.require(planned, after)
    print(text.summary(planned), file=sys.stderr)
    if begin_from is None:
        folder = prepare(planned, loaded, backend)
    else:
        folder = _rerun_from(planned, loaded, backend, begin_from, yes=yes)
    raise typer.Exit(start(folder, detach=detach, fresh=begin_from is None, after=after))


def _rerun_from(planned: "Plan", loaded: "Loaded", backend: "Backend", stage: str, *, yes: bool) -> "RunDir":
    """Return the run's folder without the stages that will be rerun, once the user agrees."""
    from ftlaunch.backend import replan, runs

    run = runs.find(planned.run_dir)
    removed = replan.obsolete_stages(run, planned, stage)
    what = f"{', '.join(removed)} of {run.path}"
    if removed and not yes:
        # In a script or a job nobody can answer.
        if not sys.stdin.isatty():
            raise UserError(f"--from removes {what}", "add --yes if that is meant")
        typer.confirm(f"This removes {what}. Go on?", abort=True, err=True)
    replan.rerun_from(run, planned, loaded, backend, removed)
    return run


def plan(
    recipe: options.RecipeName,
    settings: options.Settings = None,
    nodes: options.Nodes = None,
    procs_per_node: options.ProcsPerNode = None,
    cluster: options.ClusterName = None,
    site: options.Site = None,
    run_dir: options.RunFolder = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="First measure the speed of this machine; later plans use it too.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Show in full what a run would do and what it would cost.

    Example: ftlaunch plan my.toml --procs-per-node 2
    """
    asked = options.all_settings(settings, nodes, procs_per_node)
    if calibrate:
        _calibrate()
    loaded = load(recipe, asked)
    backend = for_recipe(loaded, cluster, site)
    if loaded.recipe.sweep is not None:
        if run_dir is not None:
            raise UserError("--run-dir is for one run, and a [sweep] is several", "leave it out")
        print(_show_sweep(loaded, asked, cluster, json=json))
        return
    print(_show(backend.plan(loaded.recipe, _folder(loaded, run_dir)), backend, json=json))


def validate(
    recipe: options.RecipeName,
    settings: options.Settings = None,
    nodes: options.Nodes = None,
    procs_per_node: options.ProcsPerNode = None,
) -> None:
    """Check a recipe and its data.

    Example: ftlaunch validate my.toml
    """
    from ftlaunch.plan import family
    from ftlaunch.plan.plan import make_specs

    asked = options.all_settings(settings, nodes, procs_per_node)
    loaded = load(recipe, asked)
    if loaded.recipe.sweep is not None:
        from ftlaunch.compare import variants

        found = variants.variants([loaded.source], asked)
        # Called for its refusals, such as unequal budgets. Nothing is written, so any folder will do.
        variants.trials(found, 1, Path())
        print(f"{loaded.source.name}: ok — {', '.join(variant.label for variant in found)}")
        return
    _folder(loaded)  # for its refusals
    specs = make_specs(loaded.recipe)
    stages = ", ".join(name.partition("-")[2] for name in specs)
    count = max(spec.world_size for spec in specs.values())
    print(f"{loaded.source.name}: ok — {stages} on {text.processes(count)}")
    for name, spec in specs.items():
        if (layout := family.layout_note(spec)) is not None:
            print(f"{name}: {layout}")


def recipes(json: options.Json = False) -> None:
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
