"""Recipes, with their [sweep] tables → the variants that are compared, each planned for every seed."""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ftlaunch import rules
from ftlaunch.errors import UserError
from ftlaunch.load import Loaded
from ftlaunch.load.layers import OfSweep
from ftlaunch.plan.plan import Plan, make_plan
from ftlaunch.recipe.recipe import Sweep
from ftlaunch.recipe.stages import Training
from ftlaunch.run.spec import StageSpec

UNSAFE = re.compile(r"[^A-Za-z0-9._=,-]+")


@dataclass(frozen=True)
class Variant:
    """One thing to be compared: a recipe with settings."""

    label: str
    recipe: Path
    settings: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Its label as the name of a folder."""
        return UNSAFE.sub("-", self.label).strip("-.")


@dataclass(frozen=True)
class Trial:
    """A variant with one seed, planned."""

    variant: Variant
    seed: int
    plan: Plan
    loaded: Loaded


def variants(recipes: Sequence[Path], settings: Sequence[str]) -> list[Variant]:
    """Every variant of the recipes, in order; the first is what the others are compared with.

    RecipeError or UserError where a recipe or its sweep is wrong, or where two variants have one name.
    """
    found: list[Variant] = []
    for path in recipes:
        loaded = rules.load_and_check(path, settings)
        recipe, folder = loaded.recipe, loaded.where.origin(("sweep",)).folder
        for label, own in _swept(recipe.sweep or Sweep()):
            name = "/".join(part for part in (recipe.name if len(recipes) > 1 or not label else "", label) if part)
            found.append(Variant(name, path, (*settings, *(OfSweep(setting, folder) for setting in own))))
    # Folders are compared, not labels: "a b" and "a/b" are both a-b on disk, where two runs cannot live.
    names = [variant.folder for variant in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"several variants are called {', '.join(sorted(twice))}", "give recipes and variants names")
    if len(found) < 2:
        raise UserError(
            f"there is nothing to compare {found[0].label} with", "name two recipes, or add a [sweep] table"
        )
    return found


def _swept(sweep: Sweep) -> Iterator[tuple[str, list[str]]]:
    """Label and settings of every named variant with every combination of the grid."""
    short = _short_names(list(sweep.grid))
    for label, own in (sweep.variants or {"": []}).items():
        for values in itertools.product(*sweep.grid.values()):
            chosen = dict(zip(sweep.grid, values, strict=True))
            told = ",".join(f"{short[key]}={value}" for key, value in chosen.items())
            # --set reads TOML, and JSON spells strings, numbers and booleans in the same way. The exception is what
            # ensure_ascii makes of an emoji: TOML has no surrogate pairs such as \ud83d\ude00.
            put = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in chosen.items()]
            yield ",".join(filter(None, (label, told))), [*own, *put]


def _short_names(keys: list[str]) -> dict[str, str]:
    """The last part of each key, or the whole key where another ends the same."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def trials(found: Sequence[Variant], seeds: int, folder: Path) -> list[Trial]:
    """Every variant with every seed, planned below the folder, seed by seed.

    RecipeError where a variant is wrong; UserError where the variants do not have the same budget.
    """
    planned: list[Trial] = []
    # Seeds outside, variants inside: after the first round every variant already has a run.
    for offset in range(seeds):
        for variant in found:
            # Loaded twice, as the recipe, the command line and the variant may all set the first seed.
            seed = rules.load_and_check(variant.recipe, variant.settings).recipe.seed + offset
            loaded = rules.load_and_check(variant.recipe, [*variant.settings, f"seed={seed}"])
            recipe = msgspec.structs.replace(loaded.recipe, sweep=None)
            plan = make_plan(recipe, folder / variant.folder / f"seed-{seed}")
            planned.append(Trial(variant, seed, plan, loaded))
    # The trials of the first seed are enough: the budget does not depend on the seed.
    _require_one_budget(planned[: len(found)])
    return planned


def home(first: Path) -> Path:
    """Where a comparison's runs are, if not told otherwise, by the first of its recipes."""
    return (Path("comparisons") / first.stem).absolute()


def _require_one_budget(of_each: Sequence[Trial]) -> None:
    first, *others = of_each
    for other in others:
        if budget(other.plan) != budget(first.plan):
            raise UserError(
                f"{other.variant.label} trains {budget(other.plan)}, and {first.variant.label} {budget(first.plan)}",
                "give all variants one budget: the same epochs, or the same steps × batch_size",
            )


def budget(plan: Plan) -> str:
    """What the training stages of a plan take in, in words."""
    return " and ".join(_budget(planned.spec) for planned in plan.stages if isinstance(planned.spec.stage, Training))


def _budget(spec: StageSpec) -> str:
    stage = spec.stage
    assert isinstance(stage, Training)
    names = ", ".join(sorted(Path(data.path).name for data in spec.data.values()))
    if stage.steps is None:
        return f"{stage.epochs or 1:g} epochs of {names}"
    return f"{stage.steps * stage.batch_size} rows of {names}"
