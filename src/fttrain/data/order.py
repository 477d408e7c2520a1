"""Which rows make up optimizer step s: a function of the seed and s alone, so it is the same at any world size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fttrain.data.node_arrays import NodeArrays, smallest_unsigned

Row = tuple[int, int]
"""(index of the data set, index of the row in it)."""

BLOCK = 4096
"""Draws of an epoch between two counts of how often each data set has been drawn."""


class Order:
    """The rows of every optimizer step over a weighted mixture of data sets.

    One data set is visited in a new permutation each epoch, its last step taking the rows that are left. In a mixture
    an epoch has as many draws as there are rows, shared out by weight; each set is walked through in permutations of
    its own, so none of its rows comes twice before all have come once.

    A row takes 4 bytes of a permutation and, in a mixture, 1 or 2 of the draws, held once by all ranks of a node.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        *,
        batch_size: int,
        seed: int,
        arrays: NodeArrays | None = None,
    ) -> None:
        self._sizes = list(sizes)
        self._batch = batch_size
        self._seed = seed
        self._arrays = arrays or NodeArrays()
        self._draws = _share_out(sum(sizes), weights) if len(sizes) > 1 else list(sizes)
        self.epoch_rows = sum(self._draws)
        self.steps_per_epoch = math.ceil(self.epoch_rows / batch_size)
        self._mixture_of = lru_cache(maxsize=1)(self._mixture)
        self._permutation_of = lru_cache(maxsize=2 * len(sizes) - 1)(self._permutation)

    def num_steps(self, *, epochs: float | None, steps: int | None) -> int:
        """Optimizer steps of a stage: `steps`, or `epochs` (1 if neither is given), at least one."""
        return steps or max(1, round((epochs or 1) * self.steps_per_epoch))

    def step(self, number: int) -> list[Row]:
        """Return the rows of an optimizer step; the first step is number 1."""
        epoch, index = divmod(number - 1, self.steps_per_epoch)
        start, end = index * self._batch, min((index + 1) * self._batch, self.epoch_rows)
        if len(self._sizes) == 1:
            return [(0, row) for row in self._permutation_of(0, epoch)[start:end].tolist()]
        # Which data set each draw of the epoch is from is shuffled once; the n-th draw of a set, counted over all
        # epochs, takes the n-th row of its walk. So a set's own epochs need not end with those of the mixture.
        mixture = self._mixture_of(epoch)
        sources = mixture.sources[start:end]
        rows = np.empty(end - start, dtype=np.int64)
        for source, before in enumerate(mixture.drawn_before(start)):
            here = np.flatnonzero(sources == source)
            rows[here] = self._walk(source, epoch * self._draws[source] + before, len(here))
        return list(zip(sources.tolist(), rows.tolist(), strict=True))

    def epoch_at(self, number: int) -> float:
        """Epochs done after optimizer step `number`."""
        return number / self.steps_per_epoch

    def _walk(self, source: int, start: int, count: int) -> np.ndarray:
        """[count] rows of a data set, from the `start`-th that was ever drawn of it."""
        found: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
        while count:
            cycle, place = divmod(start, self._sizes[source])
            found.append(self._permutation_of(source, cycle)[place : place + count])
            start, count = start + len(found[-1]), count - len(found[-1])
        return np.concatenate(found)

    def _mixture(self, epoch: int) -> "_Mixture":
        def fill(sources: np.ndarray) -> None:
            start = 0
            for source, draws in enumerate(self._draws):
                sources[start : start + draws] = source
                start += draws
            self._generator(epoch, 0).shuffle(sources)

        kind = smallest_unsigned(len(self._sizes))
        sources = self._arrays.get("mixture", epoch, self.epoch_rows, kind, fill)
        blocks = range(0, self.epoch_rows, BLOCK)
        counts = [np.bincount(sources[at : at + BLOCK], minlength=len(self._sizes)) for at in blocks]
        return _Mixture(sources, np.cumsum([np.zeros_like(counts[0]), *counts], axis=0))

    def _permutation(self, source: int, cycle: int) -> np.ndarray:
        """The rows of a data set in the order of its `cycle`-th walk: what numpy's `permutation(size)` draws."""

        def fill(rows: np.ndarray) -> None:
            rows[:] = np.arange(len(rows), dtype=rows.dtype)
            self._generator(cycle, source + 1).shuffle(rows)

        size = self._sizes[source]
        return self._arrays.get(f"permutation-{source}", cycle, size, smallest_unsigned(size), fill)

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self._seed, *key]))


@dataclass(frozen=True)
class _Mixture:
    """Which data set each draw of one epoch is from."""

    sources: np.ndarray
    """[draws]"""
    counts: np.ndarray
    """[blocks + 1, data sets]: draws of each data set before each block."""

    def drawn_before(self, draw: int) -> list[int]:
        """How often each data set is drawn before draw number `draw`."""
        # A running count per block and a look into one block: a count per draw would need more memory than the draws.
        block = draw // BLOCK
        rest = np.bincount(self.sources[block * BLOCK : draw], minlength=self.counts.shape[1])
        return (self.counts[block] + rest).tolist()


def _share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` by weight into whole numbers that add up to it."""
    # The edges are rounded, not the parts: rounded parts need not add up.
    edges = np.cumsum([0.0, *weights]) / sum(weights) * total
    return np.diff(np.rint(edges).astype(int)).tolist()
