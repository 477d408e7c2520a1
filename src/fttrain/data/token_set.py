"""Rows as tokens, in memory or mapped from a folder that is written whole or not at all."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from msgspec import Struct

from ftlaunch.run.records import Counts
from fttrain.data.chat import Encoded

log = logging.getLogger(__name__)

FILES = {"ids": np.int32, "trained": np.bool_, "lengths": np.int64, "supervised": np.int64}
MARGINS = "margins"
"""A further file, of sets of pairs only."""
OFFSETS = "offsets"
"""Where each row begins in `ids`; sets that were made by earlier versions have no file of it."""
PLACES = 9
"""Where a set is looked for: as many but one may be broken."""


Tokens = tuple[np.ndarray, np.ndarray]
"""(ids [T], trained [T]) of one row."""


class Group(NamedTuple):
    """Rows that are computed together: a single one, or the chosen and the rejected answer of a pair."""

    rows: tuple[Tokens, ...]
    margin: float = 0.0
    """How much better the chosen answer is."""
    reference: tuple[float, ...] | None = None
    """Log-probability of each answer under the reference; None where nobody asked."""


@dataclass(frozen=True)
class TokenSet:
    """Rows as tokens, laid end to end; the arrays may be mapped from disk, and several sets may share them."""

    ids: np.ndarray
    """int32, the token ids of all rows in the arrays."""
    trained: np.ndarray
    """bool, parallel to `ids`: whether the token is trained."""
    offsets: np.ndarray
    """int64: where each row of the arrays begins in `ids`."""
    sizes: np.ndarray
    """int64: tokens of each row of the arrays."""
    counts: np.ndarray
    """int64: trained tokens of each row of the arrays that something predicts, so without its first token."""
    rows: np.ndarray | None = None
    """[N] Which rows of the arrays are the set's, in its order; None: all of them, as they lie."""

    def __len__(self) -> int:
        return len(self.sizes if self.rows is None else self.rows)

    def group(self, index: int) -> Group:
        return Group((self.row(index),))

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64: tokens of each row."""
        return self.sizes if self.rows is None else self.sizes[self.rows]

    @property
    def supervised(self) -> np.ndarray:
        """[N] int64: trained tokens of each row that something predicts."""
        return self.counts if self.rows is None else self.counts[self.rows]

    def row(self, index: int) -> Tokens:
        """(ids [T], trained [T]) of one row, as views."""
        place = index if self.rows is None else self.rows[index]
        here = slice(self.offsets[place], self.offsets[place] + self.sizes[place])
        return self.ids[here], self.trained[here]

    def take(self, rows: np.ndarray) -> "TokenSet":
        """The set of these rows, in this order, over the same arrays."""
        return replace(self, rows=rows if self.rows is None else self.rows[rows])


@dataclass(frozen=True)
class PairSet:
    """Pairs of rows. N: pairs."""

    answers: TokenSet
    """The chosen and the rejected row of the first pair of the arrays, of the second, …"""
    margin_of: np.ndarray
    """float32: of each pair of the arrays."""
    pairs: np.ndarray | None = None
    """[N] Which pairs of the arrays are the set's, in its order; None: all of them, as they lie."""
    references: np.ndarray | None = None
    """[N, 2] float32: log-probabilities of the chosen and the rejected answer under the reference."""

    def __len__(self) -> int:
        return len(self.margin_of if self.pairs is None else self.pairs)

    def group(self, index: int) -> Group:
        pair = index if self.pairs is None else int(self.pairs[index])
        rows = (self.answers.row(2 * pair), self.answers.row(2 * pair + 1))
        reference = None if self.references is None else tuple(self.references[index].tolist())
        return Group(rows, float(self.margin_of[pair]), reference)

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64: tokens of both rows of each pair."""
        return self._of_both(self.answers.lengths)

    @property
    def supervised(self) -> np.ndarray:
        """[N] int64: trained tokens of both rows of each pair that something predicts."""
        return self._of_both(self.answers.supervised)

    def _of_both(self, values: np.ndarray) -> np.ndarray:
        of_pairs = values.reshape(-1, 2)
        return (of_pairs if self.pairs is None else of_pairs[self.pairs]).sum(axis=1)

    def take(self, pairs: np.ndarray) -> "PairSet":
        """The set of these pairs, in this order, over the same arrays."""
        references = None if self.references is None else self.references[pairs]
        return replace(self, pairs=pairs if self.pairs is None else self.pairs[pairs], references=references)


class Meta(Struct, frozen=True, kw_only=True):
    """`meta.json` of a set on disk, written last."""

    counts: Counts
    sizes: dict[str, int]
    """Bytes of each file."""


def token_set(rows: Iterable[Encoded]) -> TokenSet:
    """Encoded rows as a set in memory."""
    rows = list(rows)
    lengths = np.array([len(row.ids_T) for row in rows], dtype=np.int64)
    return TokenSet(
        ids=np.array([token for row in rows for token in row.ids_T], dtype=np.int32),
        trained=np.array([trained for row in rows for trained in row.trained_T], dtype=np.bool_),
        offsets=offsets_of(lengths),
        sizes=lengths,
        counts=np.array([supervised(row) for row in rows], dtype=np.int64),
    )


def supervised(row: Encoded) -> int:
    """Trained tokens that something predicts: all but the row's first."""
    return row.trained_T.count(True) - (row.trained_T[:1] == [True])


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Return [N] int64: where each row begins, for rows of these lengths laid end to end."""
    return np.cumsum(lengths, dtype=np.int64) - lengths


def open_set(folder: Path) -> tuple[TokenSet | PairSet, Counts] | None:
    """The set that was kept under a folder's name, mapped from disk; None where there is none that can be read."""
    # A set is put into the first folder that is free, so after the first one that is missing there is none.
    there = takewhile(Path.exists, places(folder))
    return next((found for place in there if (found := open_folder(place))), None)


def places(folder: Path) -> Iterator[Path]:
    """Yield the folders where a set may be: the named one, or numbered ones next to it if that is broken.

    A broken set is never deleted: it may be one that another node has just put there.
    """
    yield folder
    yield from (folder.with_name(f"{folder.name}-{number}") for number in range(2, PLACES + 1))


def open_folder(folder: Path) -> tuple[TokenSet | PairSet, Counts] | None:
    """The set in a folder; None where it is broken, which is logged."""
    try:
        meta = msgspec.json.decode((folder / "meta.json").read_bytes(), type=Meta)
        # Sizes tell a torn or cut file at once; a digest of gigabytes would be read at every start.
        sizes = {name: (folder / name).stat().st_size for name in meta.sizes}
    except (OSError, msgspec.DecodeError) as error:
        log.warning("the cached tokens in %s are not read: %s", folder, error)
        return None
    if sizes != meta.sizes:
        log.warning("the cached tokens in %s are not read: files have changed size", folder)
        return None
    # Mapped and not read: all ranks of a node then share one copy in the page cache.
    ids, trained, lengths, counts = (_mapped(folder / name, kind) for name, kind in FILES.items())
    offsets = _mapped(folder / OFFSETS, np.int64) if OFFSETS in sizes else offsets_of(lengths)
    rows = TokenSet(ids, trained, offsets, lengths, counts)
    return (PairSet(rows, _mapped(folder / MARGINS, np.float32)) if MARGINS in sizes else rows), meta.counts


def _mapped(path: Path, kind: type) -> np.ndarray:
    return np.asarray(np.memmap(path, kind, "r"))
