"""The verb that has models answer held-out prompts, and compares their answers with the references."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ftlaunch.cli.model import resolve_model
from ftlaunch.cli.options import ClusterName, Json, Settings, Site, defaults
from ftlaunch.cli.profile import backend_named
from ftlaunch.errors import UserError
from ftlaunch.tools import EvaluateOptions, HarnessOptions

_DEFAULTS = defaults(EvaluateOptions)
Metrics = Annotated[
    list[str] | None,
    typer.Option("--metric", metavar="NAME", help="A metric, as recipes name it. Default: bleu nist coco_rouge_l."),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="NAME", help="A task of lm-evaluation-harness instead of the data held out."),
]
TaskFolder = Annotated[
    Path | None, typer.Option("--task-folder", metavar="DIR", help="A folder with tasks of your own.")
]
DataName = Annotated[
    str | None, typer.Option("--data", metavar="NAME", help="The data set. Default: the only one that fits.")
]

if TYPE_CHECKING:
    from ftlaunch.recipe.recipe import Recipe


def evaluate(
    source: Annotated[str, typer.Argument(metavar="RUN|RECIPE", help="A run or a recipe, for its data.")],
    model: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL…", help="Models, as in chat. Default: a run's base and its newest model."),
    ] = None,
    metric: Metrics = None,
    task: Tasks = None,
    task_folder: TaskFolder = None,
    data: DataName = None,
    prompts: Annotated[int | None, typer.Option(min=1, metavar="N", help="Use only the first N prompts.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")
    ] = _DEFAULTS.max_new_tokens,
    answers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write prompts, references and answers (.jsonl).")
    ] = None,
    choices_field: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Field with a row's choices, for multiple_choice.")
    ] = None,
    label_field: Annotated[str | None, typer.Option(metavar="FIELD", help="The field with the right choice.")] = None,
    resamples: Annotated[
        int, typer.Option(min=0, metavar="N", help="Bootstrap resamples for 95 % intervals. 0: none.")
    ] = _DEFAULTS.resamples,
    settings: Settings = None,
    cluster: ClusterName = None,
    site: Site = None,
    as_json: Json = False,
) -> None:
    """Generate answers to the held-out prompts and score them.

    Example: ftlaunch eval my-run --prompts 50
    """
    backend = backend_named(cluster, site)
    recipe, models = _asked(source, model or [], settings or [])
    if task or task_folder is not None:
        _require_none(metric=metric, data=data, answers=answers, choices_field=choices_field, label_field=label_field)
        _require_none(max_new_tokens=max_new_tokens, resamples=resamples)
        raise typer.Exit(backend.call(_of_harness(models, task or [], task_folder, prompts, as_json=as_json)))
    # Checked now: the tool opens the file only after minutes of generation.
    if answers is not None:
        _require_room(answers)
    options = EvaluateOptions(
        recipe=recipe,
        models=models,
        metrics=_metrics(metric) if metric else _DEFAULTS.metrics,
        data=data,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        choices_field=choices_field,
        label_field=label_field,
        resamples=resamples,
        answers=None if answers is None else str(answers),
        json=as_json,
    )
    raise typer.Exit(backend.call(options))


def _metrics(written: list[str]) -> tuple[str, ...]:
    from ftlaunch.load import paths

    return tuple(paths.SETTLED_BY["metric"](each, Path.cwd()) for each in written)


def _asked(source: str, models: list[str], settings: list[str]) -> "tuple[Recipe, list[str]]":
    """The recipe, and what is to be evaluated. UserError where either is wanting."""
    from ftlaunch import rules
    from ftlaunch.backend import runs
    from ftlaunch.load import catalog

    models = [resolve_model(each, merged=True) for each in models]
    if (run := runs.look_for(source)) is None:
        recipe = rules.load_and_check(catalog.find_recipe(source), settings).recipe
        if not models:
            raise UserError(
                f"{source} is a recipe, and has made no model", "name models after it, or a run in its place"
            )
        return recipe, models
    recipe = rules.check_resolved(run.resolved, settings).recipe
    revision = f"@{recipe.model.revision}" if recipe.model.revision else ""
    # The base goes first, as the tool gives differences from the first model.
    return recipe, models or [recipe.model.path + revision, resolve_model(source, merged=True)]


def _of_harness(
    models: list[str], tasks: list[str], folder: Path | None, prompts: int | None, *, as_json: bool
) -> HarnessOptions:
    if not tasks:
        raise UserError("--task-folder counts only with --task", "name a task, or leave it out")
    place = None if folder is None else str(folder.absolute())
    return HarnessOptions(models=models, tasks=tuple(tasks), folder=place, prompts=prompts, json=as_json)


def _require_none(**given: object) -> None:
    """Raise UserError for an option that a task of the harness has no use for."""
    for name, value in given.items():
        if value not in (None, getattr(_DEFAULTS, name, None)):
            message = f"--{name.replace('_', '-')} does not count with --task, which brings its own data and scores"
            raise UserError(message, "leave it out")


def _require_room(answers: Path) -> None:
    if answers.exists():
        raise UserError(f"--answers {answers}: the file exists", "name another, or remove it")
    if not answers.absolute().parent.is_dir():
        raise UserError(f"--answers {answers}: there is no such folder", f"mkdir -p {answers.parent}")
