"""Which rows are held out for evaluation: single ones, or prompts with all that answers them."""

from collections.abc import Iterable

import numpy as np

from fttrain.data.token_set import PairSet, TokenSet


def prompts_of(rows: TokenSet | PairSet) -> Iterable[bytes]:
    """What each row or pair begins with, up to the first trained token."""
    for index in range(len(rows)):
        ids_T, trained_T = rows.group(index).rows[0]
        yield ids_T[: int(trained_T.argmax())].tobytes()


def by_prompt(prompts: Iterable[bytes], size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on, in their order, and rows held out: all rows of prompts that are drawn until there are `size`.

    None is left to train on where all rows have one prompt.
    """
    numbers: dict[bytes, int] = {}
    labels = np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts], dtype=np.int64)
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(len(numbers))
    sizes = np.bincount(labels, minlength=len(numbers))[drawn].cumsum()
    held = np.zeros(len(numbers), dtype=bool)
    held[drawn[: int(np.searchsorted(sizes, size)) + 1]] = size > 0
    is_held = held[labels]
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def on_both_sides(train: TokenSet | PairSet, test: TokenSet | PairSet) -> int:
    """Rows held out whose prompt rows to train on have, too; texts have none."""
    held = [prompt for prompt in prompts_of(test) if prompt]
    wanted = set(held)
    shared = {prompt for prompt in prompts_of(train) if prompt in wanted} if wanted else set[bytes]()
    return sum(prompt in shared for prompt in held)
