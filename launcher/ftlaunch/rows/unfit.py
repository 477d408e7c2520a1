"""Rows that are left out: counted by their reasons, the first ones by name, and whether there are too many of them."""

from collections import Counter
from typing import Any

from ftlaunch.recipe.data import Data
from ftlaunch.rows.template import DataError, Excused, Unfit

NAMED = 3
"""Rows that are named."""


class UnfitRows:
    """The unfit rows of a data set, so far."""

    def __init__(self) -> None:
        self.unfit: Counter[str] = Counter()
        self.excused: Counter[str] = Counter()
        """Rows by the reason that they are left out; those that are no mistake by themselves."""
        self.firsts: dict[str, Unfit] = {}
        """The first row of each reason."""
        self.examples: list[str] = []
        """The first few unfit rows, each with its place and its reason."""

    def add(self, row: Unfit) -> None:
        (self.excused if row.is_excused else self.unfit)[row.reason] += 1
        self.firsts.setdefault(row.reason, row)
        if len(self.examples) < NAMED and not row.is_excused:
            self.examples.append(row.message)

    def append(self, later: "UnfitRows") -> None:
        """Count rows that come after these."""
        self.unfit.update(later.unfit)
        self.excused.update(later.excused)
        # The right side wins, so the first row of a reason stays its example.
        self.firsts = later.firsts | self.firsts
        self.examples = [*self.examples, *later.examples][:NAMED]

    def as_plain(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        firsts = [[one.where, one.problem, one.remedy, one.is_excused] for one in self.firsts.values()]
        return {"unfit": self.unfit, "excused": self.excused, "firsts": firsts, "examples": self.examples}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "UnfitRows":
        """What `as_plain` gave."""
        rows = cls()
        rows.unfit, rows.excused = Counter(plain["unfit"]), Counter(plain["excused"])
        firsts = [(Excused if is_excused else Unfit)(*of_row) for *of_row, is_excused in plain["firsts"]]
        rows.firsts = {row.reason: row for row in firsts}
        rows.examples = plain["examples"]
        return rows

    def every(self) -> dict[str, int]:
        """Both kinds of rows, by reason."""
        return {**self.unfit, **self.excused}

    def are_too_many(self, data: Data, rows: int) -> bool:
        """Whether nothing is trained on so many of the data set's `rows`."""
        return bool(self.unfit) and (data.unfit == "stop" or self.unfit.total() > data.unfit_share * rows)

    def require_few(self, data: Data, rows: int) -> None:
        """Raise DataError, with the first row of the most frequent reason, where there are too many."""
        if not self.are_too_many(data, rows):
            return
        reason, count = self.unfit.most_common(1)[0]
        first = self.firsts[reason]
        more = f"; {self.unfit.total()} in all" if len(self.unfit) > 1 else ""
        raise DataError(
            first.where, f"{first.problem} (in {count} of {rows} rows{more})", remedy(first, data, every=count == rows)
        )


def remedy(first: Unfit, data: Data, *, every: bool) -> str:
    """What to do about a reason for which too many rows are left out; none is left to train on if it is `every` row."""
    if every:
        return first.remedy
    key = 'unfit = "drop"' if data.unfit == "stop" else "a larger unfit_share"
    return f"{first.remedy}; or have such rows left out with {key} in the data table"


def summary(rows: int, unfit: dict[str, int], examples: list[str]) -> str:
    """One line on rows that were left out, for a log."""
    reasons = ", ".join(f"{count} × {reason}" for reason, count in unfit.items())
    named = f"; first {'; '.join(examples)}" if examples else ""
    return f"{sum(unfit.values())} of {rows} rows left out: {reasons}{named}"
