"""What must hold between the keys of a recipe whose every key is right by itself."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ftlaunch import data_rules, resolve, stage_rules
from ftlaunch.data_rules import DataTable
from ftlaunch.errors import Problem, RecipeError
from ftlaunch.load import Loaded, load_recipe
from ftlaunch.recipe import Full, Merge, Sft
from ftlaunch.stage_rules import Training
from ftlaunch.wording import literal


def check(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a recipe, judge it and look into its local data files. Raises RecipeError with everything that is wrong."""
    loaded = load_recipe(path, overrides)
    problems = judge(loaded) or list(_row_problems(loaded))
    if problems:
        raise RecipeError(problems)
    return loaded


def judge(loaded: Loaded) -> list[Problem]:
    """Every contradiction and every combination that is not supported, each once."""
    problems = [problem for table in _data_tables(loaded) for rule in data_rules.RULES for problem in rule(table)]
    problems += [problem for stage in _trainings(loaded) for rule in stage_rules.RULES for problem in rule(stage)]
    problems += [problem for rule in RULES for problem in rule(loaded)]
    return list(dict.fromkeys(problems))


def _data_tables(loaded: Loaded) -> Iterator[DataTable]:
    for name, data in loaded.recipe.data.items():
        yield DataTable(loaded, name, data)


def _trainings(loaded: Loaded) -> Iterator[Training]:
    for index, stage in enumerate(loaded.recipe.stage):
        if isinstance(stage, Sft):
            yield Training(loaded, index, stage, resolve.for_stage(loaded.recipe, stage))


def _row_problems(loaded: Loaded) -> Iterator[Problem]:
    from ftlaunch.rows import check_rows

    for table in _data_tables(loaded):
        if Path(table.data.path).is_absolute():
            for where, message, remedy in check_rows(table.data):
                yield Problem(where, f"data.{table.name}", message, remedy)


def data_is_used(loaded: Loaded) -> Iterator[Problem]:
    used = {name for training in _trainings(loaded) for name in training.data_names}
    for name in loaded.recipe.data:
        if name not in used:
            remedy = f"remove the table, or write data = {literal(name)} in a stage"
            yield loaded.problem(("data", name), "is not used by any stage", remedy)


def merge_is_last(loaded: Loaded) -> Iterator[Problem]:
    for index, stage in enumerate(loaded.recipe.stage[:-1]):
        if isinstance(stage, Merge):
            yield loaded.problem(("stage", index), "merge must be the last stage", "move it to the end, or remove it")


def merge_has_an_adapter(loaded: Loaded) -> Iterator[Problem]:
    recipe = loaded.recipe
    index, stage = len(recipe.stage) - 1, recipe.stage[-1]
    if not isinstance(stage, Merge):
        return
    trained = resolve.trained_before(recipe, stage)
    if trained is None:
        remedy = 'put a stage with kind = "sft" before it'
        yield loaded.problem(("stage", index), "merge has nothing to merge, as no stage comes before it", remedy)
    elif isinstance(resolve.for_stage(recipe, trained).adapter, Full):
        message = "merge has nothing to merge: after full fine-tuning the artifact is the model already"
        yield loaded.problem(("stage", index), message, 'remove the stage, or add [adapter] with kind = "lora"')


RULES = (data_is_used, merge_is_last, merge_has_an_adapter)
