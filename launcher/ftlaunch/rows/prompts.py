"""A row → what is to be answered: its conversation without the last answer, which it need not have."""

from ftlaunch.recipe import Data
from ftlaunch.rows.conversations import Turn, finished, read_turns, row_format
from ftlaunch.rows.pairs import Unfit, pair_of
from ftlaunch.rows.template import Row

ANSWER: Turn = {"role": "assistant", "content": ""}


def prompt_of(data: Data, row: Row, where: str) -> list[Turn] | Unfit:
    """The turns up to where an answer begins; of a pair those that its answers share, or why it has none.

    For every format but "text". Raises DataError naming `where` and what is wrong.
    """
    if row_format(data) in ("preference", "ratings"):
        pair = pair_of(data, row, where)
        return pair if isinstance(pair, str) else pair.chosen[:-1]
    turns = read_turns(data, row, where)
    asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    return finished([*asked, ANSWER], data, row, where)[:-1]
