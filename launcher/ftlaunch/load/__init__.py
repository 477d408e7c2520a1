"""A recipe file → a Recipe that is right key by key. Defaults < `extends` < the file < `--set`."""

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from ftlaunch.errors import Problem, RecipeError
from ftlaunch.load import decode, layers, paths
from ftlaunch.load.layers import BASE, Layer
from ftlaunch.load.origins import KeyPath, Source, SourceMap, dotted
from ftlaunch.recipe.recipe import Recipe


class Loaded(Struct, frozen=True):
    """A recipe and where each key of it was written."""

    recipe: Recipe
    source: Path
    text: str
    """The file as written."""
    where: SourceMap
    remarks: tuple[str, ...] = ()
    """What names and a look at the data have shown that is no problem."""
    misplaced: tuple[Problem, ...] = ()
    """Paths that name nothing, as they are written; for `rules`, which tells them together with what it finds."""

    is_for_here: bool = False
    """Whether a key was settled by what this machine has, so that the recipe is right for no other."""

    def problem(self, path: KeyPath, message: str, remedy: str) -> Problem:
        """A problem with the key at the path."""
        return Problem(self.where(path), dotted(path), message, remedy)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a recipe, with `key.path=value` overrides put in. Raises RecipeError with everything wrong in its keys.

    A recipe whose only faults are paths that name nothing is returned, together with these.
    """
    text = layers.read_text(path)
    return _as_loaded(_with_base(layers.parse(text, path), path), overrides, path, text)


def load_resolved(path: Path, overrides: Sequence[str]) -> Loaded:
    """Read the resolved.json of a run, with overrides put in. Raises RecipeError with everything wrong in its keys."""
    text = layers.read_text(path)
    # Without origins every problem is placed at the top of the file: nobody wrote its lines.
    return _as_loaded(Layer(layers.without_null(json.loads(text)), {}), overrides, path, text)


def _as_loaded(written: Layer, overrides: Sequence[str], path: Path, text: str) -> Loaded:
    # Overrides go in before anything is checked: `--set` may correct what the file has wrong.
    layer, problems = layers.override(written, overrides)
    where = SourceMap(Source(f"{path}:1", path.absolute().parent), layer.origins)
    problems += decode.find_problems(Recipe, layer.values, where)
    # A key that already has a problem is not looked up as a path as well.
    settled = paths.settle(Recipe, layer.values, where, {problem.key for problem in problems})
    if problems:
        raise RecipeError([*problems, *settled.problems])
    recipe = msgspec.convert(settled.values, Recipe)
    return Loaded(recipe, path, text, where, tuple(settled.remarks), tuple(settled.problems))


def _with_base(layer: Layer, path: Path) -> Layer:
    """The layer over that of the recipe which it extends. A base that is no text is left for `find_problems`."""
    named = layer.values.get(BASE)
    if not isinstance(named, str) or not named:
        return layer
    base_path = path.parent / Path(named).expanduser()
    place = layer.origins[(BASE,)].place
    if not base_path.is_file():
        message = f"there is no recipe {base_path.absolute()}"
        raise RecipeError([Problem(place, BASE, message, f"correct the path; it counts from {path.absolute().parent}")])
    base = layers.parse(layers.read_text(base_path), base_path)
    if BASE in base.values:
        message = f"a base may not extend another recipe, and {base_path} does"
        raise RecipeError([Problem(base.origins[(BASE,)].place, BASE, message, "put both bases into one file")])
    return layers.merge(base, layer)
