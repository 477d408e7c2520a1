"""The text of a conversation without what is said in it: made once for all conversations of the same roles.

Only templates that are blind to what turns say have skeletons, and only plain turns fit into them.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ftlaunch.rows.messages import Conversation, Turn
from ftlaunch.rows.template import Unfit
from fttrain.data.blind import blindness

Span = tuple[int, int]
"""First character and the one after the last."""
BEGIN, END = "\ue000", "\ue001"
MARK = re.compile(f"{BEGIN}(\\d+){END}")
"""What stands for the content of a turn, with the turn's number."""
PLAIN_TURN = {"role", "content"}


@dataclass(frozen=True)
class Rendered:
    """One row as text."""

    text: str
    trained: list[Span]
    has_marks: bool = False
    """Whether marks of `fttrain.data.control` stand for control tokens in it."""
    is_respaced: bool = False
    """Whether the template has changed white space of a trained answer."""

    @property
    def borders(self) -> list[int]:
        """Where a prompt ends and an answer begins, so that a token may not lie across."""
        return [start for start, _ in self.trained if start > 0]


@dataclass(frozen=True)
class Skeleton:
    """Pieces of text, and between them the turns whose contents belong there."""

    pieces: list[str]
    """One more than there are contents."""
    contents: list[int]
    """Number of the turn that is said after each piece but the last."""
    spans: list[tuple[int, int, int, int]]
    """Trained spans: where each begins, as a piece and a character of it, and where it ends."""

    def filled(self, said: Sequence[str]) -> Rendered:
        """The text with what each turn says in its place."""
        parts, starts, length = list[str](), list[int](), 0
        for piece, turn in zip(self.pieces, [*self.contents, None], strict=True):
            starts.append(length)
            parts.append(piece)
            length += len(piece)
            if turn is not None:
                parts.append(said[turn])
                length += len(said[turn])
        trained = [(starts[first] + start, starts[last] + end) for first, start, last, end in self.spans]
        return Rendered("".join(parts), trained)


class Skeletons:
    """The skeletons of one template, each made by rendering marks where contents would stand."""

    def __init__(self, template: str | None, render: Callable[[Conversation], list[Rendered]]) -> None:
        self._blindness = None if template is None or BEGIN in template or END in template else blindness(template)
        self._render = render
        self._made: dict[Any, Skeleton | None] = {}

    def filled(self, conversation: Conversation) -> Rendered | None:
        """What `render` makes of the conversation, put together; None where that is not known to be the same."""
        turns = conversation.turns
        if self._blindness is None or not all(self._fits(turn) for turn in turns):
            return None
        # A blind template copies contents without looking at them, so its output depends on the roles alone: one
        # rendering with marks in the place of contents serves all conversations of these roles.
        shape = (tuple(turn["role"] for turn in turns), conversation.untrained)
        if shape not in self._made:
            self._made[shape] = self._skeleton(conversation)
        skeleton = self._made[shape]
        return skeleton and skeleton.filled([turn["content"] for turn in turns])

    def _fits(self, turn: Turn) -> bool:
        assert self._blindness is not None
        if turn.keys() != PLAIN_TURN or not isinstance(content := turn["content"], str):
            return False
        # An empty text, or one that a template would trim, is not copied as a mark would be.
        return bool(content) and (not self._blindness.trims or content == content.strip())

    def _skeleton(self, conversation: Conversation) -> Skeleton | None:
        turns = [
            {"role": turn["role"], "content": f"{BEGIN}{number}{END}"} for number, turn in enumerate(conversation.turns)
        ]
        try:
            rendered = self._render(Conversation(turns, {}, conversation.untrained))
        except Unfit:
            return None
        return _taken_apart(rendered[0]) if len(rendered) == 1 else None


def _taken_apart(rendered: Rendered) -> Skeleton | None:
    """The skeleton of a text with marks; None where a border lies in a mark, or a trained span has no mark."""
    marks = list(MARK.finditer(rendered.text))
    edges = [0, *(edge for mark in marks for edge in mark.span()), len(rendered.text)]
    pieces = [rendered.text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
    spans: list[tuple[int, int, int, int]] = []
    for start, end in rendered.trained:
        places = [_place(edges, character) for character in (start, end)]
        if None in places or not MARK.search(rendered.text[start:end]):
            return None
        spans.append((*places[0], *places[1]))  # type: ignore[misc] none of them is None
    return Skeleton(pieces, [int(mark[1]) for mark in marks], spans)


def _place(edges: list[int], character: int) -> tuple[int, int] | None:
    """The piece in which a character lies, and where in it."""
    for piece, (start, end) in enumerate(zip(edges[::2], edges[1::2], strict=True)):
        if start <= character <= end:
            return piece, character - start
    return None
