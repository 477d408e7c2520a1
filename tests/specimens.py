"""Specimens: a recipe for any combination of the table of ftlaunch.compatibility, and samples of those that work."""

import json
import random
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

from tests.conftest import write_rows

from ftlaunch.compatibility import works
from ftlaunch.compatibility.axes import AXES, BY_NAME, PAIRWISE, Axis, Combination
from ftlaunch.load import Loaded, load_recipe

HEAD = """
name = "specimen"
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


class Specimens:
    """Recipes on a tiny model, its rows, and a reward function."""

    def __init__(self, model: str, folder: Path) -> None:
        self._model, self._folder = model, folder
        rows = write_rows(folder / "rows.jsonl").read_text().splitlines()
        pairs = [{"prompt": row["question"], "chosen": row["answer"], "rejected": "lamp"} for row in map(json.loads, rows)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        (folder / "reward.py").write_text("def length(prompt, answer, row):\n    return len(answer) / 4\n")

    def load(self, combination: Combination, number: int = 0, *more: str) -> Loaded:
        """The recipe of a combination, with more settings. Raises RecipeError where the vocabulary has none."""
        path = self._folder / "specimen.toml"
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
        match combination.get("after"):
            case "merge":
                behind = MERGE
            case "other_adapter":
                behind = f'{stage}adapter = {{kind = "lora", rank = 2}}\nnoise.kind = "none"\n'
                behind += f'model = {{path = "{self._model}", dtype = "{combination.get("dtype", "fp32")}"}}\n'
            case _:
                behind = ""
        return head + stage + behind


def covering(fixed: Combination, seed: int = 0) -> Iterator[dict[str, str]]:
    """Combinations that work, and hold every pair of values that works with others: greedily, the fullest first.

    `fixed` says what axes are not to vary. Pairs that no combination can hold are left out.
    """
    draw = random.Random(seed)
    axes = [Axis(axis.name, {fixed[axis.name]: ()}) if axis.name in fixed else axis for axis in AXES]
    left = {pair for pair in _pairs(axes) if works(dict(pair))}
    while left:
        wanted = min(left)
        tries = [made for _ in range(8) if (made := _complete(dict(wanted), axes, left, draw))]
        if not tries:
            left.remove(wanted)
            continue
        best = max(tries, key=lambda made: len(left & _held(made)))
        left -= _held(best)
        yield best


Pair = tuple[tuple[str, str], tuple[str, str]]
"""Two (axis, value), sorted."""


def _pairs(axes: Sequence[Axis]) -> Iterator[Pair]:
    for one, other in combinations(axes, 2):
        yield from (_pair((one.name, a), (other.name, b)) for a in one.values for b in other.values)


def _pair(one: tuple[str, str], other: tuple[str, str]) -> Pair:
    return (one, other) if one < other else (other, one)


def _held(combination: Combination) -> set[Pair]:
    return {_pair(one, other) for one, other in combinations(combination.items(), 2)}


def _complete(
    begun: dict[str, str], axes: Sequence[Axis], left: set[Pair], draw: random.Random
) -> dict[str, str] | None:
    """The combination with a value on every axis, each the one that holds most of the pairs that are left."""
    choices = {
        axis.name: [value for value in axis.values if works({**begun, axis.name: value})]
        for axis in axes
        if axis.name not in begun
    }
    if not choices:
        return begun
    axis = min(choices, key=lambda name: (len(choices[name]), draw.random()))  # the one with the least choice left
    gains = {
        value: sum(_pair((axis, value), item) in left for item in begun.items()) + draw.random()
        for value in choices[axis]
    }
    for value in sorted(gains, key=gains.__getitem__, reverse=True):
        if made := _complete({**begun, axis: value}, axes, left, draw):
            return made
    return None
