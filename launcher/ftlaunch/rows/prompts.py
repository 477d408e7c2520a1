"""A row → what is to be answered: its conversation without the last answer, which it need not have."""

from ftlaunch.recipe.data import Data
from ftlaunch.rows.conversations import answer, finished, is_paired, read_conversation
from ftlaunch.rows.messages import Conversation
from ftlaunch.rows.pairs import pair_of
from ftlaunch.rows.template import Row


def prompt_of(data: Data, row: Row, where: str) -> Conversation:
    """The turns up to where an answer begins; of a pair those that its answers share.

    For every format but "text". Raises Unfit naming `where` and what is wrong.
    """
    if is_paired(data):
        chosen = pair_of(data, row, where).chosen
        return chosen.up_to(len(chosen.turns) - 1)
    found = read_conversation(data, row, where)
    asked = found.up_to(len(found.turns) - 1) if found.turns[-1]["role"] == "assistant" else found
    # `finished` asks for an answer at the end: an empty one stands in for it and is cut off again.
    whole = finished(asked.followed_by(Conversation([answer("")])), data, row, where)
    return whole.up_to(len(whole.turns) - 1)
