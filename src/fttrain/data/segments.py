"""Where the rows of a packed micro-batch lie, and which queries and keys are attended to together.

No mask of the whole line is ever made. A row is attended to in pieces: all of it at once, or, where a query sees only
the last few keys or those of its own chunk, in stretches of queries that have only the keys that some of them see.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

WASTE = 1.3
"""Pieces share a call while the longest is at most so many times the shortest."""
TILE = 128
"""Queries of a piece under a sliding window, at least; under a wide window as many as the window has keys."""

Prefix = tuple[int, int]
"""(first token, number of tokens) of the part of an earlier row that a row goes on from; (0, 0) for none."""


@dataclass(frozen=True)
class Reach:
    """Which keys of its row a query sees: itself and, by default, all that come before it."""

    window: int | None = None
    """The last so many, itself included."""
    chunk: int | None = None
    """Those since the last multiple of this position."""


WHOLE = Reach()


@dataclass(frozen=True)
class Piece:
    """Consecutive queries of a row and the keys up to the last of them, by their positions in the row."""

    index: np.ndarray
    """Token index of every position of the row, its prefix's first."""
    keys_from: int
    queries_from: int
    end: int

    def __len__(self) -> int:
        return self.end - self.queries_from

    @property
    def earlier(self) -> int:
        """Keys before the first query."""
        return self.queries_from - self.keys_from


@dataclass(frozen=True)
class Block:
    """Pieces of like length, attended to in one call. Short ones are padded by repeating token 0."""

    queries: Tensor
    """[pieces, Tq]: token index of every place."""
    keys: Tensor
    """[pieces, Tk]: those before the first query, right-aligned, then the queries' own."""
    mask: Tensor | None
    """[pieces or 1, 1, Tq, Tk], True where a query sees a key; None where attention is plainly causal."""


@dataclass(frozen=True)
class Blocks:
    """All attention of a micro-batch: T tokens."""

    blocks: tuple[Block, ...]
    scatter_T: Tensor
    """Each token's place in the blocks' outputs laid end to end."""


@dataclass(frozen=True)
class Bounds:
    """The same for a kernel that takes sequences of any lengths: pieces end to end. K: keys of all pieces."""

    queries: Tensor
    """Cumulative numbers of queries, int32, [pieces + 1]."""
    most_queries: int
    keys: Tensor
    """Cumulative numbers of keys, int32, [pieces + 1]."""
    most_keys: int
    keys_K: Tensor
    """Token index of every key."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Where the rows of a packed micro-batch lie. What attention needs of it is made when it is first asked for."""

    starts: tuple[int, ...]
    """Index of each row's first own token."""
    lengths: tuple[int, ...]
    """Own tokens of each row."""
    prefixes: tuple[Prefix, ...]
    device: torch.device
    _blocks: dict[Reach, Blocks] = field(default_factory=dict)
    _bounds: dict[Reach, Bounds] = field(default_factory=dict)

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device, prefixes: Sequence[Prefix] | None = None) -> "Segments":
        """The layout of rows of these lengths, in this order. A row sees its prefix whole, and itself causally."""
        starts = np.cumsum([0, *lengths])[:-1].tolist()
        prefixes = prefixes or [(0, 0)] * len(lengths)
        return Segments(tuple(starts), tuple(lengths), tuple(prefixes), device)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def has_prefixes(self) -> bool:
        return any(length for _, length in self.prefixes)

    @cached_property
    def longest(self) -> int:
        """Positions of the longest row, its prefix included."""
        return max(length + prefix for length, (_, prefix) in zip(self.lengths, self.prefixes, strict=True))

    def within(self, reach: Reach) -> Reach:
        """The same reach, without the limits that no row is long enough to meet."""
        limits = (reach.window, reach.chunk)
        return Reach(*(limit if limit is not None and limit < self.longest else None for limit in limits))

    def blocks(self, reach: Reach = WHOLE) -> Blocks:
        """Attention as calls on padded blocks."""
        if reach not in self._blocks:
            self._blocks[reach] = self._laid_in_blocks(reach)
        return self._blocks[reach]

    def bounds(self, reach: Reach = WHOLE) -> Bounds:
        """Attention as one call on sequences of any lengths; a window is left to the kernel."""
        if reach not in self._bounds:
            pieces = self._pieces(Reach(chunk=reach.chunk))
            keys = [piece.index[piece.keys_from : piece.end] for piece in pieces]
            self._bounds[reach] = Bounds(
                queries=self._cumulated([len(piece) for piece in pieces]),
                most_queries=max(map(len, pieces)),
                keys=self._cumulated([len(part) for part in keys]),
                most_keys=max(map(len, keys)),
                keys_K=torch.from_numpy(np.concatenate(keys)).to(self.device),
            )
        return self._bounds[reach]

    def _cumulated(self, counts: list[int]) -> Tensor:
        return torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32, device=self.device)

    def _pieces(self, reach: Reach) -> list[Piece]:
        """Return the rows' pieces in order of the line, so that their queries are its tokens from first to last."""
        pieces: list[Piece] = []
        for start, length, (first, shared) in zip(self.starts, self.lengths, self.prefixes, strict=True):
            # A row's positions are its prefix, which lies elsewhere in the line, and its own tokens: `index` maps them.
            index = np.concatenate([np.arange(first, first + shared), np.arange(start, start + length)])
            pieces += _cut(index, shared, reach)
        return pieces

    def _laid_in_blocks(self, reach: Reach) -> Blocks:
        pieces = self._pieces(reach)
        # Outputs of all blocks are laid end to end: `used` places so far, a line of `width` places for each piece. A
        # token's output is then at used + line · width + its place in the piece; padding is never looked up.
        blocks, scatter, used = [], np.empty(self.tokens, dtype=np.int64), 0
        for members in _alike([len(piece) for piece in pieces], [piece.earlier for piece in pieces]):
            chosen = [pieces[member] for member in members]
            blocks.append(_block(chosen, reach.window, self.device))
            width = blocks[-1].queries.shape[1]
            for line, piece in enumerate(chosen):
                own = piece.index[piece.queries_from : piece.end]
                scatter[own] = np.arange(len(own)) + used + line * width
            used += len(chosen) * width
        return Blocks(tuple(blocks), torch.from_numpy(scatter).to(self.device))


def _cut(index: np.ndarray, shared: int, reach: Reach) -> list[Piece]:
    """The pieces of one row, whose first `shared` positions are another row's queries."""
    end = len(index)
    if reach.window is None and reach.chunk is None:
        return [Piece(index, 0, shared, end)]
    # Queries are cut into tiles. Under a window a tile of `width` queries sees width + window - 1 keys instead of all;
    # with a chunk the tile is the chunk, and sees only its own keys. Tiles of the prefix alone are left out.
    width = reach.chunk or max(reach.window or 0, TILE)
    pieces = []
    for tile in range(shared // width * width, end, width):
        first, last = max(tile, shared), min(tile + width, end)
        seen_from = tile if reach.chunk else 0
        if reach.window is not None:
            seen_from = max(seen_from, first - reach.window + 1)
        pieces.append(Piece(index, seen_from, first, last))
    return pieces


def _block(pieces: list[Piece], window: int | None, device: torch.device) -> Block:
    wide, long = max(piece.earlier for piece in pieces), max(map(len, pieces))
    queries = np.zeros((len(pieces), long), dtype=np.int64)
    keys = np.zeros((len(pieces), wide + long), dtype=np.int64)
    for line, piece in enumerate(pieces):
        queries[line, : len(piece)] = piece.index[piece.queries_from : piece.end]
        # Earlier keys are aligned at column `wide`, so that query q's own key is at column wide + q in every line.
        keys[line, wide - piece.earlier : wide + len(piece)] = piece.index[piece.keys_from : piece.end]
    mask = _seen([piece.earlier for piece in pieces], long, window, device)
    return Block(torch.from_numpy(queries).to(device), torch.from_numpy(keys).to(device), mask)


def _seen(earlier: list[int], long: int, window: int | None, device: torch.device) -> Tensor | None:
    """[pieces or 1, 1, Tq, Tk]. Every query, padding included, sees at least the key at its own place."""
    wide = max(earlier)
    if wide == 0 and (window is None or window >= long):
        return None
    places = torch.arange(wide + long, device=device)
    back = torch.arange(long, device=device)[:, None] + wide - places  # how many keys before the query's own
    mask = (back >= 0)[None, None]
    if window is not None:
        mask = mask & (back < window)
    if min(earlier) < wide:
        begins = wide - torch.tensor(earlier, device=device)
        mask = mask & (places >= begins[:, None])[:, None, None]
    return mask


def _alike(lengths: list[int], earlier: list[int]) -> list[list[int]]:
    """Return pieces grouped by length and by the number of keys before them, the longest of each group first."""
    order = sorted(range(len(lengths)), key=lambda piece: (-earlier[piece], -lengths[piece]))
    groups: list[list[int]] = []
    for piece in order:
        first = groups[-1][0] if groups else piece
        alike = lengths[piece] <= lengths[first] <= WASTE * lengths[piece] and earlier[first] <= WASTE * earlier[piece]
        if groups and alike:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups
