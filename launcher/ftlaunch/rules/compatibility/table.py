"""The table as a page of Markdown: which values go together, and why those that are refused do not."""

from collections.abc import Iterator, Sequence
from itertools import combinations

from ftlaunch.load.messages import as_toml, join_or
from ftlaunch.rules.compatibility import MAIN, reasons
from ftlaunch.rules.compatibility.axes import AXES, BY_NAME
from ftlaunch.rules.compatibility.refusals import REFUSALS, Refusal

Named = tuple[str, str]
"""An axis and a value on it."""
WORKS = "✓"
HEAD = """\
# What goes with what

Made from launcher/ftlaunch/rules/compatibility by `python -m ftlaunch.rules.compatibility`; do not edit.
`ftlaunch validate` speaks from the same table: a recipe is refused where two of its values are, or three of them
together (below).

✓ works. tests/trainer/test_compatibility.py trains such combinations on a tiny model, kills them, resumes them,
compares every metric and weight with a run that was left alone, evaluates, and merges where a merge comes after.
`make test` tries the first of a sample in which any two values meet, `make compatibility` all of it and every
cell of method × stage × strategy × quantization. What needs a GPU (cuda, fp16, paged optimizers) is judged, and not yet
among those tried.

A number marks a combination that is refused; look it up under "Reasons".
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, *_values()]
    for one, other in combinations(MAIN, 2):
        parts += [f"\n## {other.capitalize()} × {one}\n", *_grid(_of(other), _of(one))]
    for axis in MAIN:
        parts += [f"\n## Feature × {axis}\n", *_grid(_features(), _of(axis))]
    parts += ["\n## Feature × feature\n\nThose that are refused; all others work.\n", *_refused(_features())]
    parts += ["\n## Reasons\n", *_reasons()]
    return "\n".join(parts) + "\n"


def _of(axis: str) -> list[Named]:
    return [(axis, value) for value in BY_NAME[axis].values]


def _features() -> list[Named]:
    """Every value of the other axes that is not what counts where nothing is said."""
    return [(axis.name, value) for axis in AXES if axis.name not in MAIN for value in list(axis.values)[1:]]


def _name(named: Named) -> str:
    axis, value = named
    if axis in MAIN:
        return value
    return axis if value == "on" else f"{axis} {value}"


def _values() -> Iterator[str]:
    """How the values of the features are written; those of the main axes are words of the recipe themselves."""
    yield "\n## Features\n"
    yield "| | written, for example, as |\n| --- | --- |"
    for axis, value in _features():
        ways = BY_NAME[axis].values[value]
        # `--set` writes "stage.0." for the first stage; the page speaks of any.
        written = " or ".join(f"`{way.replace('stage.0.', 'stage.').replace(' ', '`, `')}`" for way in ways if way)
        yield f"| {_name((axis, value))} | {written or SAID[(axis, value)]} |"


SAID: dict[Named, str] = {
    ("after", "merge"): 'a later stage with `kind = "merge"`',
    ("after", "same_adapter"): "a later training stage that goes on with its adapter, or with all weights",
    ("after", "other_adapter"): "a later training stage with another adapter, which begins on a merge",
    ("resumed_by", "other_ranks"): "`ftlaunch resume` with another number of processes",
}


def _grid(rows: Sequence[Named], columns: Sequence[Named]) -> Iterator[str]:
    yield f"| | {' | '.join(_name(column) for column in columns)} |"
    yield f"| --- |{' --- |' * len(columns)}"
    for row in rows:
        yield f"| {_name(row)} | {' | '.join(_cell(row, column) for column in columns)} |"


def _cell(*values: Named) -> str:
    return ", ".join(str(_number(reason)) for reason in reasons(dict(values))) or WORKS


def _refused(values: Sequence[Named]) -> Iterator[str]:
    yield "| | | |\n| --- | --- | --- |"
    for one, other in combinations(values, 2):
        # Two values of one axis never meet in a stage.
        if one[0] != other[0] and (cell := _cell(one, other)) != WORKS:
            yield f"| {_name(one)} | {_name(other)} | {cell} |"


def _number(refusal: Refusal) -> int:
    return REFUSALS.index(refusal) + 1


def _reasons() -> Iterator[str]:
    yield "| | refused | key | why | remedy |\n| --- | --- | --- | --- | --- |"
    for refusal in REFUSALS:
        of = " × ".join(f"{axis}: {', '.join(values)}" for axis, values in refusal.of.items())
        words = {axis: join_or(map(as_toml, values)) for axis, values in refusal.of.items()}
        # A recipe gets the exact reason for its function; the page has one that covers all.
        why = refusal.message.format(reason="transformers' configs have no word for it", **words)
        yield f"| {_number(refusal)} | {of} | {refusal.key} | {why} | {refusal.remedy} |"
