"""What must hold between the keys of a recipe whose every key is right by itself."""

from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path

import msgspec

from ftlaunch import rows
from ftlaunch.errors import Problem, RecipeError
from ftlaunch.load import Loaded, load_recipe, load_resolved
from ftlaunch.recipe.names import is_local
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.recipe.stages import Evaluate, Ppo, Training
from ftlaunch.rows import check_rows
from ftlaunch.rules import adapter as adapter_rules
from ftlaunch.rules import combinations, order, secrets, track
from ftlaunch.rules import data as data_rules
from ftlaunch.rules import evaluations as evaluations_rules
from ftlaunch.rules import noise as noise_rules
from ftlaunch.rules import stage as stage_rules


def load_and_check(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a recipe, judge it and look into its local data files. Raises RecipeError with everything that is wrong."""
    return _passed(load_recipe(path, overrides))


def check_resolved(resolved: Path, overrides: Sequence[str]) -> Loaded:
    """`load_and_check` of a run's resolved recipe with overrides put in."""
    return _passed(load_resolved(resolved, overrides))


def _passed(loaded: Loaded) -> Loaded:
    """The recipe with what its data tells. Raises RecipeError with every problem of keys, paths and rows."""
    # The strategy goes by the model's config, which may be what is misplaced.
    if loaded.recipe.leaves_strategy_open and not loaded.misplaced:
        from ftlaunch.rules import strategy  # it imports all that counts memory

        loaded = strategy.settled(loaded, find_problems)
    # Formats before the rules, as many of them ask for one.
    loaded, unread = _with_formats(loaded, _troubled(loaded.misplaced))
    problems = [*loaded.misplaced, *find_problems(loaded), *unread]
    loaded, found = _with_rows_looked_at(loaded, _troubled(problems))
    if problems or found:
        raise RecipeError([*problems, *found])
    return loaded


def _troubled(problems: Iterable[Problem]) -> set[str]:
    """The data tables that have a problem already: their rows would only repeat it."""
    return {problem.key.split(".")[1] for problem in problems if problem.key.startswith("data.")}


def _with_formats(loaded: Loaded, passed_over: Set[str]) -> tuple[Loaded, list[Problem]]:
    """The recipe with the formats that the rows of local data tell, and what keeps them from telling."""
    data, remarks, problems = dict(loaded.recipe.data), list(loaded.remarks), list[Problem]()
    trained_on = _trained_on(loaded.recipe)
    for name, table in data.items():
        # Only the trainer reads the rows of the hub.
        if name in passed_over or not rows.looks.is_open(table) or not is_local(table.path):
            continue
        try:
            data[name] = rows.settled(table, only_prompts=name not in trained_on)
        except rows.DataError as error:
            problems.append(Problem(error.where, f"data.{name}", error.problem, error.remedy))
        if data[name].format is not None:
            field = (data[name].system or "").strip("{?}")
            system = f", with the system turns of the field {field}" if data[name].system != table.system else ""
            remarks.append(f"data.{name}: format {data[name].format}, told by the fields of its rows{system}")
    recipe = msgspec.structs.replace(loaded.recipe, data=data)
    return msgspec.structs.replace(loaded, recipe=recipe, remarks=tuple(remarks)), problems


def _trained_on(recipe: Recipe) -> set[str]:
    """The data tables whose answers are trained: PPO, which answers itself, takes prompts alone."""
    stages = [stage for stage in recipe.stage if isinstance(stage, Training) and not isinstance(stage, Ppo)]
    return {name for stage in stages for name in stage.data_names}


def find_problems(loaded: Loaded) -> list[Problem]:
    """Every contradiction and every combination that is not supported, each once."""
    tables, trainings = data_rules.data_tables(loaded), list(stage_rules.trainings(loaded))
    problems = [problem for table in tables for rule in data_rules.RULES for problem in rule(table)]
    of_training = (*stage_rules.RULES, *evaluations_rules.RULES, *adapter_rules.RULES, *noise_rules.RULES)
    problems += [problem for training in trainings for rule in of_training for problem in rule(training)]
    problems += _of_rare_stages(loaded)
    problems += [problem for rule in (*order.RULES, *track.RULES) for problem in rule(loaded)]
    problems += combinations.combinations_are_supported(loaded)
    problems += secrets.secrets_stay_out(loaded)
    # A table that two stages share is judged for each, and its problem is one and the same.
    return list(dict.fromkeys(problems))


def _of_rare_stages(loaded: Loaded) -> Iterator[Problem]:
    """The same of kinds of stages that few recipes have: their rules are imported with the first."""
    kinds = {type(stage) for stage in loaded.recipe.stage}
    if Evaluate in kinds:
        from ftlaunch.rules import evaluate

        for evaluation in evaluate.evaluate_stages(loaded):
            yield from (problem for rule in evaluate.RULES for problem in rule(evaluation))
    if Ppo in kinds:
        from ftlaunch.rules import ppo

        for one in ppo.ppo_stages(loaded):
            yield from (problem for rule in ppo.RULES for problem in rule(one))


def _with_rows_looked_at(loaded: Loaded, passed_over: Set[str]) -> tuple[Loaded, list[Problem]]:
    """The same with what is left out of local data as remarks, and where that is too much."""
    problems, remarks = list[Problem](), list(loaded.remarks)
    trained_on = _trained_on(loaded.recipe)
    for table in data_rules.data_tables(loaded):
        if table.name in passed_over or not is_local(table.data.path):
            continue
        for key, data in (("", table.data), (".eval", rows.for_evaluation(table.data))):
            if data is not None:
                found = check_rows(data, only_prompts=table.name not in trained_on)
                problems += [Problem(where, f"data.{table.name}{key}", *told) for where, *told in found.problems]
                remarks += [f"data.{table.name}{key}: {note}" for note in found.notes]
    return msgspec.structs.replace(loaded, remarks=tuple(remarks)), problems
