"""What can be trained with what: one table, from which recipes are judged, the documentation is made and trials drawn.

A combination that no refusal concerns works, and tests/trainer/test_compatibility.py tries it.
"""

from collections.abc import Iterator

from ftlaunch.compatibility.axes import Combination
from ftlaunch.compatibility.refusals import REFUSALS, Refusal


def refusals(combination: Combination) -> Iterator[Refusal]:
    """Why a combination is refused; nothing where it works. What it says nothing of is not looked at."""
    return (refusal for refusal in REFUSALS if refusal.concerns(combination))


def works(combination: Combination) -> bool:
    """Whether nothing refuses a combination."""
    return next(refusals(combination), None) is None
