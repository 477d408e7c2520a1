"""What can be trained with what: one table, from which recipes are judged, the documentation is made and trials drawn.

A combination that no refusal concerns works, and tests/trainer/test_compatibility.py tries it.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

from ftlaunch.rules.compatibility.axes import AXES, Combination
from ftlaunch.rules.compatibility.refusals import REFUSALS, Refusal

MAIN = ("method", "stage", "strategy", "quantization")
"""The axes on which every training stage says something; those after them are features."""
Choices = Mapping[str, Sequence[str]]
"""What each axis may be."""
EVERYTHING: Choices = {axis.name: tuple(axis.values) for axis in AXES}
Prefer = Callable[[dict[str, str], str, str], float]
"""How welcome a value of an axis is with the values that are chosen already."""


def refusals(combination: Combination) -> Iterator[Refusal]:
    """Why a combination is refused; nothing where it works. An axis that it is silent of is not looked at."""
    return (refusal for refusal in REFUSALS if refusal.concerns(combination))


def _alike(begun: dict[str, str], axis: str, value: str) -> float:  # noqa: ARG001 as Prefer has them
    return 0.0


def complete(begun: dict[str, str], choices: Choices = EVERYTHING, prefer: Prefer = _alike) -> dict[str, str] | None:
    """A combination that works, with a value on every axis and these among them; None where there is none."""
    if any(refusals(begun)):
        return None
    left = {name: _left(begun, name, values) for name, values in choices.items() if name not in begun}
    return _complete(begun, left, prefer)


def _complete(begun: dict[str, str], left: Choices, prefer: Prefer) -> dict[str, str] | None:
    """`complete` with what is left to choose. The axis with the least choice goes first, so dead ends show early."""
    if not left:
        return begun
    axis = min(left, key=lambda name: len(left[name]))
    # Stable, in reverse too: of values that are equally welcome the first of the axis is tried first.
    for value in sorted(left[axis], key=lambda value: prefer(begun, axis, value), reverse=True):
        chosen = {**begun, axis: value}
        # Only an axis that some refusal links to the new value can have lost values by it.
        touched = {other for refusal in _concerned(axis, value) for other in refusal.of}
        rest = {
            name: _left(chosen, name, values) if name in touched else values
            for name, values in left.items()
            if name != axis
        }
        # An axis without a value left makes a further search pointless.
        if all(rest.values()) and (found := _complete(chosen, rest, prefer)):
            return found
    return None


def _left(begun: dict[str, str], axis: str, values: Sequence[str]) -> Sequence[str]:
    """The values of an axis that go with a combination that works without one."""
    return [
        value
        for value in values
        if not any(refusal.concerns({**begun, axis: value}) for refusal in _concerned(axis, value))
    ]


@functools.cache
def _concerned(axis: str, value: str) -> list[Refusal]:
    return [refusal for refusal in REFUSALS if value in refusal.of.get(axis, ())]


def reasons(combination: dict[str, str], depth: int = 2) -> list[Refusal]:
    """Why no combination that works has these values, in the table's order; empty where one has.

    Where they are not refused by themselves, there is an axis on which each value is refused together with them.
    """
    found = list(refusals(combination))
    if found or complete(combination) is not None:
        return found
    for axis in AXES if depth else ():
        if axis.name not in combination:
            each = [_shallow({**combination, axis.name: value}, depth - 1) for value in axis.values]
            if all(each):
                return [refusal for refusal in REFUSALS if any(refusal in one for one in each)]
    return []


def _shallow(combination: dict[str, str], depth: int) -> list[Refusal]:
    return list(refusals(combination)) or (reasons(combination, depth) if depth else [])
