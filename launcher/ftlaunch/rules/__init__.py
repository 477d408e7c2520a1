"""What must hold between the keys of a recipe whose every key is right by itself."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ftlaunch.errors import Problem, RecipeError
from ftlaunch.load import Loaded, load_recipe, load_resolved
from ftlaunch.rows import check_rows
from ftlaunch.rules import adapter as adapter_rules
from ftlaunch.rules import combinations, order, secrets
from ftlaunch.rules import data as data_rules
from ftlaunch.rules import noise as noise_rules
from ftlaunch.rules import ppo as ppo_rules
from ftlaunch.rules import stage as stage_rules


def check(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a recipe, judge it and look into its local data files. Raises RecipeError with everything that is wrong."""
    return _passed(load_recipe(path, overrides))


def check_again(resolved: Path, overrides: Sequence[str]) -> Loaded:
    """`check` of a run's resolved recipe with overrides put in."""
    return _passed(load_resolved(resolved, overrides))


def _passed(loaded: Loaded) -> Loaded:
    problems = judge(loaded) or list(_row_problems(loaded))
    if problems:
        raise RecipeError(problems)
    return loaded


def judge(loaded: Loaded) -> list[Problem]:
    """Every contradiction and every combination that is not supported, each once."""
    tables, trainings = data_rules.data_tables(loaded), list(stage_rules.trainings(loaded))
    problems = [problem for table in tables for rule in data_rules.RULES for problem in rule(table)]
    of_training = (*stage_rules.RULES, *adapter_rules.RULES, *noise_rules.RULES)
    problems += [problem for training in trainings for rule in of_training for problem in rule(training)]
    ppos = list(ppo_rules.ppo_stages(loaded))
    problems += [problem for ppo in ppos for rule in ppo_rules.RULES for problem in rule(ppo)]
    problems += [problem for rule in order.RULES for problem in rule(loaded)]
    problems += combinations.combinations_are_supported(loaded)
    problems += secrets.secrets_stay_out(loaded)
    return list(dict.fromkeys(problems))


def _row_problems(loaded: Loaded) -> Iterator[Problem]:
    for table in data_rules.data_tables(loaded):
        if Path(table.data.path).is_absolute():
            for where, message, remedy in check_rows(table.data).problems:
                yield Problem(where, f"data.{table.name}", message, remedy)
