"""Rows that are held out for evaluation together: those of a prompt, and the parts of a document."""

from collections.abc import Iterable

import numpy as np

from fttrain.data.token_set import PairSet, TokenSet


def prompts_of(rows: TokenSet | PairSet) -> Iterable[bytes]:
    """What each row or pair begins with, up to the first trained token."""
    for index in range(len(rows)):
        ids_T, trained_T = rows.group(index).rows[0]
        yield ids_T[: int(trained_T.argmax())].tobytes()


def numbered(prompts: Iterable[bytes]) -> np.ndarray:
    """[N] int64: a number for each prompt, the same for the same ones."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts], dtype=np.int64)


def documents_of(rows: TokenSet) -> np.ndarray:
    """[N] int64: the number of the document that each row of text is a part of. A document's last part ends in EOS."""
    ends = rows.ids[(rows.offsets + rows.lengths - 1).astype(np.int64)]
    is_last = ends == ends[-1]  # the last row of all ends a document, so its last token is EOS
    return np.cumsum(is_last) - is_last


def whole_groups(groups_N: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows to train on, in their order, and held-out rows: whole groups are drawn until they have `size` rows.

    If there is only one group, no row is left to train on.
    """
    count = int(groups_N.max()) + 1
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(count)
    # After how many drawn groups are `size` rows reached? One more than the search finds, as it counts from 0.
    sizes = np.bincount(groups_N, minlength=count)[drawn].cumsum()
    held = np.zeros(count, dtype=bool)
    held[drawn[: int(np.searchsorted(sizes, size)) + 1]] = size > 0
    is_held = held[groups_N]
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def on_both_sides(train: TokenSet | PairSet, test: TokenSet | PairSet) -> int:
    """Rows held out whose prompt rows to train on have, too; texts have none."""
    held = [prompt for prompt in prompts_of(test) if prompt]
    wanted = set(held)
    shared = {prompt for prompt in prompts_of(train) if prompt in wanted} if wanted else set[bytes]()
    return sum(prompt in shared for prompt in held)
