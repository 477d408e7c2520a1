"""SampleRecipes: a recipe for any combination of the table of compatibility, and samples of those that work."""

import json
import random
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from pathlib import Path

from tests.conftest import write_rows

from ftlaunch.load import Loaded, load_recipe
from ftlaunch.recipe.stages import Pairwise, Stage
from ftlaunch.recipe.types import kinds
from ftlaunch.rules.compatibility import EVERYTHING, MAIN, Choices, complete, refusals
from ftlaunch.rules.compatibility.axes import BY_NAME, Combination

PAIRWISE = kinds(Stage, lambda kind: issubclass(kind, Pairwise))
HEAD = """
name = "sample"
seed = 7
[model]
path = "{model}"
[data.rows]
path = "{rows}"
test = 4
{columns}
"""
STAGE = """
[[stage]]
kind = "{kind}"
data = "rows"
steps = 5
batch_size = 8
learning_rate = 1e-3
save_every = 2
evaluate_every = 2
"""
COLUMNS = 'prompt = "{question}"\ncompletion = "{answer}"'
OF_KIND = {
    "ppo": 'max_new_tokens = 4\nreward_function = "reward.py:length"\nrollout_size = 16\nppo_epochs = 2\n',
    **dict.fromkeys(PAIRWISE, "share_prompt = false\n"),
}
MERGE = '[[stage]]\nkind = "merge"\n'
SMALL = {"lora": "rank=4 alpha=8", "prefix": "virtual_tokens=5"}
"""Settings of adapters for a small model, by the kind that they are named for."""


def settings(combination: Combination, number: int = 0) -> list[str]:
    """What `--set` is told to make a recipe of the combination; `number` chooses among the ways to write a value."""
    ways = [BY_NAME[axis].values[value] for axis, value in combination.items()]
    return [setting for way in ways for setting in way[number % len(way)].split()]


class SampleRecipes:
    """Recipes on a tiny model, its rows, and a reward function."""

    def __init__(self, model: str, folder: Path) -> None:
        self._model, self._folder = model, folder
        rows = write_rows(folder / "rows.jsonl").read_text().splitlines()
        pairs = [
            {"prompt": row["question"], "chosen": row["answer"], "rejected": "lamp"} for row in map(json.loads, rows)
        ]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        (folder / "reward.py").write_text("def length(prompt, answer, row):\n    return len(answer) / 4\n")

    def load(self, combination: Combination, number: int = 0, *more: str) -> Loaded:
        """The recipe of a combination, with more settings. Raises RecipeError where the vocabulary has none."""
        path = self._folder / "sample.toml"
        path.write_text(self._text(combination))
        return load_recipe(path, [*settings(combination, number), *more])

    def _text(self, combination: Combination) -> str:
        kind = combination.get("stage", "sft")
        pairs = kind in PAIRWISE
        head = HEAD.format(
            model=self._model,
            rows="pairs.jsonl" if pairs else "rows.jsonl",
            columns='format = "preference"' if pairs else COLUMNS,
        )
        stage = STAGE.format(kind=kind) + OF_KIND.get(kind, "")
        packing = f"packing = {'true' if combination.get('packing') == 'on' else 'false'}\n"
        match combination.get("after"):
            case "merge":
                after = MERGE
            case "same_adapter":
                after = stage + packing
            case "other_adapter":
                after = stage + packing + 'adapter = {kind = "lora", rank = 2}\nnoise.kind = "none"\n'
            case _:
                after = ""
        return head + stage + after


Pair = tuple[tuple[str, str], tuple[str, str]]
"""Two (axis, value), sorted."""
TRIES = 8


def covering(fixed: Combination, *, cells: bool = True, seed: int = 0) -> Iterator[dict[str, str]]:
    """Combinations that work, and hold every two values that work together: greedily, those with most of them first.

    Then, with `cells`, as many more as have every method with every stage, strategy and quantization that works.
    `fixed` says what axes are not to vary.
    """
    draw = random.Random(seed)
    choices = {axis: (fixed[axis],) if axis in fixed else tuple(values) for axis, values in EVERYTHING.items()}
    left = {pair for pair in _pairs(choices) if not any(refusals(dict(pair)))}

    def prefer(begun: dict[str, str], axis: str, value: str) -> float:
        return sum(_pair((axis, value), item) in left for item in begun.items()) + draw.random()

    quads = set(product(*(choices[axis] for axis in MAIN))) if cells else set()
    while left or quads:
        wanted = dict(min(left)) if left else _of_main(min(quads))
        tries = [made for _ in range(TRIES if left else 1) if (made := complete(wanted, choices, prefer))]
        held = max(tries, key=lambda made: len(left & _held(made)), default=wanted)
        left -= _held(held)
        quads.discard(tuple(held.get(axis, "") for axis in MAIN))
        if tries:
            yield held


def _of_main(cell: Sequence[str]) -> dict[str, str]:
    return dict(zip(MAIN, cell, strict=True))


def _pairs(choices: Choices) -> Iterator[Pair]:
    for one, other in combinations(choices, 2):
        yield from (_pair((one, a), (other, b)) for a in choices[one] for b in choices[other])


def _pair(one: tuple[str, str], other: tuple[str, str]) -> Pair:
    return (one, other) if one < other else (other, one)


def _held(combination: Combination) -> set[Pair]:
    return {_pair(one, other) for one, other in combinations(combination.items(), 2)}
