"""Which rows make up optimizer step s: a function of the seed and s alone, so it is the same at any world size."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

Row = tuple[int, int]
"""(index of the data set, index of the row in it)."""


class Order:
    """The rows of every optimizer step over a weighted mixture of data sets.

    One data set is visited in a new permutation each epoch, its last step taking the rows that are left. In a mixture
    an epoch has as many draws as there are rows, shared out by weight; each set is walked through in permutations of
    its own, so none of its rows comes twice before all have come once.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, batch_size: int, seed: int) -> None:
        self._sizes = list(sizes)
        self._batch = batch_size
        self._seed = seed
        self._draws = _share_out(sum(sizes), weights) if len(sizes) > 1 else list(sizes)
        self.epoch_rows = sum(self._draws)
        self.steps_per_epoch = math.ceil(self.epoch_rows / batch_size)
        self._epoch_rows_of = lru_cache(maxsize=2)(self._epoch)
        self._permutation_of = lru_cache(maxsize=2 * len(sizes))(self._permutation)

    def num_steps(self, *, epochs: float | None, steps: int | None) -> int:
        """Optimizer steps of a stage: `steps`, or `epochs` (1 if neither is given), at least one."""
        return steps or max(1, round((epochs or 1) * self.steps_per_epoch))

    def step(self, number: int) -> list[Row]:
        """Rows of optimizer step 1, 2, …"""
        epoch, index = divmod(number - 1, self.steps_per_epoch)
        return self._epoch_rows_of(epoch)[index * self._batch : (index + 1) * self._batch]

    def epoch_at(self, number: int) -> float:
        """Epochs done after optimizer step `number`."""
        return number / self.steps_per_epoch

    def _epoch(self, epoch: int) -> list[Row]:
        sources = np.repeat(np.arange(len(self._draws)), self._draws)
        if len(self._draws) > 1:
            sources = self._generator(epoch, 0).permutation(sources)
        taken = [epoch * draws for draws in self._draws]
        rows: list[Row] = []
        for source in sources.tolist():
            cycle, place = divmod(taken[source], self._sizes[source])
            rows.append((source, int(self._permutation_of(source, cycle)[place])))
            taken[source] += 1
        return rows

    def _permutation(self, source: int, cycle: int) -> np.ndarray:
        return self._generator(cycle, source + 1).permutation(self._sizes[source])

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self._seed, *key]))


def _share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` by weight into whole numbers that add up to it."""
    edges = np.cumsum([0.0, *weights]) / sum(weights) * total
    return np.diff(np.rint(edges).astype(int)).tolist()
