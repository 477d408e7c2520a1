"""Groups of several token sets, each opened when it is asked for: their sizes are told by the sets' own counts."""

from collections.abc import Callable, Sequence
from typing import overload

import numpy as np

from fttrain.data.token_set import Group, PairSet, TokenSet


class Drawn(Sequence[Group]):
    """Some rows or pairs of token sets, in an order of their own. N: groups."""

    def __init__(self, sets: Sequence[TokenSet | PairSet], sources: np.ndarray, rows: np.ndarray) -> None:
        """`sources` [N] are indices of sets, `rows` [N] of rows or pairs in them."""
        self._sets = sets
        self._sources = sources
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Group: ...

    @overload
    def __getitem__(self, place: slice) -> "Drawn": ...

    def __getitem__(self, place: int | slice) -> "Group | Drawn":
        if isinstance(place, slice):
            return Drawn(self._sets, self._sources[place], self._rows[place])
        return self._sets[int(self._sources[place])].group(int(self._rows[place]))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each group, those that its rows share counted for each of them."""
        return self._of_each(lambda some: some.lengths)

    @property
    def supervised(self) -> list[int]:
        """Trained tokens of each group that something predicts."""
        return self._of_each(lambda some: some.supervised)

    def _of_each(self, value: Callable[[TokenSet | PairSet], np.ndarray]) -> list[int]:
        found = np.empty(len(self), dtype=np.int64)
        for source in np.unique(self._sources):
            here = self._sources == source
            found[here] = value(self._sets[source].take(self._rows[here]))
        return found.tolist()


def drawn(sets: Sequence[TokenSet | PairSet], rows: Sequence[tuple[int, int]]) -> Drawn:
    """The groups at these (index of the set, index of the row in it)."""
    places = np.array(rows, dtype=np.int64).reshape(-1, 2)
    return Drawn(sets, places[:, 0], places[:, 1])


def all_of(sets: Sequence[TokenSet | PairSet]) -> Drawn:
    """The groups of all sets, the short ones first."""
    sizes = [len(one) for one in sets]
    sources = np.repeat(np.arange(len(sets), dtype=np.uint16), sizes)
    rows = np.concatenate([np.zeros(0, dtype=np.uint32), *(np.arange(size, dtype=np.uint32) for size in sizes)])
    lengths = np.concatenate([np.zeros(0, dtype=np.int64), *(one.lengths for one in sets)])
    order = np.argsort(lengths, kind="stable")
    return Drawn(sets, sources[order], rows[order])
