"""A row → token ids and which of them are trained.

Every conversation is rendered to one text and tokenized once, just as it will be when the model is used; what is
trained follows from where the assistant's turns lie in that text.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from tokenizers import Encoding

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.rows.conversations import row_format
from ftlaunch.rows.messages import Conversation
from ftlaunch.rows.pairs import pair_of
from ftlaunch.rows.template import Excused, Row, Unfit
from fttrain.data.control import MARK, control_tokens
from fttrain.data.render import Renderer
from fttrain.data.skeleton import Rendered, Span
from fttrain.data.templates import added_bos, end_tokens

Offset = tuple[int, int]
"""First character of a token and the one after its last."""


@dataclass(frozen=True)
class Encoded:
    """One row as tokens."""

    ids_T: list[int]
    trained_T: list[bool]
    lost: int = 0
    """Tokens that were cut off at `max_length`."""
    is_parted: bool = False
    """Whether a token lay across the border of prompt and answer, and was parted there."""

    has_control: bool = False
    """Whether a control token stood in what was said, and is text."""

    respaced_at: str | None = None
    """The row's place, where the chat template has changed white space of a trained answer."""

    @property
    def truncated(self) -> bool:
        return self.lost > 0


@dataclass(frozen=True)
class EncodedPair:
    """Two rows that differ in their answer."""

    chosen: Encoded
    rejected: Encoded
    margin: float


class Encoder:
    """Turns the rows of one data set into tokens. A row may make several, and a row that makes none is Unfit.

    Raises UserError where tokenizer and data do not go together.
    """

    def __init__(self, tokenizer: Any, data: Data) -> None:
        if not tokenizer.is_fast:
            remedy = "use a model folder with a tokenizer.json"
            raise UserError("the tokenizer cannot tell which characters a token stands for (it is a slow one)", remedy)
        self.data = data
        self._renderer = Renderer(tokenizer, data)
        self.template = self._renderer.template
        """Jinja text; None where the row's text is taken as it is."""
        self._tokenizer = tokenizer
        self._bos_id, self._eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._start = [tokenizer.bos_token_id] if added_bos(tokenizer) else []
        self._end_ids = end_ids(tokenizer)
        self._control = control_tokens(tokenizer)
        self._blank: dict[int, bool] = {}
        is_text = row_format(data) == "text"
        self._overlong = data.overlong or ("split" if is_text else "truncate")

    def encode_many(self, rows: Sequence[tuple[str, Row]]) -> list[list[Encoded] | Unfit]:
        """What each row makes, or why it makes nothing."""
        # All texts of many rows go to the tokenizer in one call: a call for each row costs more than its tokens.
        rendered = [self._rendered(row, where) for where, row in rows]
        encoded = self._encode(rows, rendered)
        return [found if isinstance(found, Unfit) else _gathered(encoded, len(found)) for found in rendered]

    def encode_pairs(self, rows: Sequence[tuple[str, Row]]) -> list[list[EncodedPair] | Unfit]:
        """The pair of each row, or why it makes none."""
        found = [self._rendered_pair(row, where) for where, row in rows]
        encoded = self._encode(rows, [pair if isinstance(pair, Unfit) else pair[:2] for pair in found])
        return [
            pair if isinstance(pair, Unfit) else _paired(next(encoded), next(encoded), pair[2], where)
            for (where, _), pair in zip(rows, found, strict=True)
        ]

    def encode_prompt(self, conversation: Conversation, where: str) -> list[int]:
        """Tokens of the turns as they stand when the model begins its answer. Raises Unfit."""
        ids, _ = self._tokens(self._renderer.prompt(conversation, where).text)
        self._refuse_doubles(ids, where)
        return ids

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens with which an answer ends in this data set's template."""
        return end_tokens(self._tokenizer, self.template)

    def is_ended(self, encoded: Encoded) -> bool:
        """Return whether the last trained token, without white space, ends a turn: EOS or another special token."""
        for token, trained in zip(reversed(encoded.ids_T), reversed(encoded.trained_T), strict=True):
            if trained and not self._is_blank(token):
                return token in self._end_ids
        return False

    def _rendered(self, row: Row, where: str) -> list[Rendered] | Unfit:
        try:
            return self._renderer.row(row, where)
        except Unfit as unfit:
            return unfit

    def _rendered_pair(self, row: Row, where: str) -> tuple[Rendered, Rendered, float] | Unfit:
        try:
            pair = pair_of(self.data, row, where)
            return (*self._renderer.pair(pair, where), pair.margin)
        except Unfit as unfit:
            return unfit

    def _encode(
        self, rows: Sequence[tuple[str, Row]], rendered: Sequence[Sequence[Rendered] | Unfit]
    ) -> Iterator[list[Encoded] | Unfit]:
        """What each text of the fit rows makes, in their order."""
        places = [where for where, _ in rows]
        fit = [(where, found) for where, found in zip(places, rendered, strict=True) if not isinstance(found, Unfit)]
        texts = [(where, text) for where, found in fit for text in found]
        if not texts:
            return
        batch = self._tokenizer(
            [text.text for _, text in texts],
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for (where, row), tokens in zip(texts, batch.encodings, strict=True):
            try:
                yield self._finished(row, tokens, where)
            except Unfit as unfit:
                yield unfit

    def _finished(self, row: Rendered, tokens: Encoding, where: str) -> list[Encoded]:
        """Tokens and marks of a text, within `max_length`. Raises Unfit."""
        ids = tokens.ids
        if row.has_marks:
            tokens, ids = self._control.encode(row.text)
        self._refuse_doubles(ids, where)
        # The common case first: every border lies between two tokens, and no list of all offsets is made.
        places = _places(tokens, row.trained)
        respaced_at = where if row.is_respaced else None
        if places is not None:
            trained = _marked(len(ids), places)
            return self._fitted(Encoded(ids, trained, has_control=row.has_marks, respaced_at=respaced_at), where)
        offsets = tokens.offsets
        whole = len(ids), offsets
        # From the last border to the first, so that parting a token leaves the earlier borders where they are.
        for border in reversed(row.borders):
            ids, offsets = self._parted(row.text, ids, offsets, border, where)
        trained = _mark([start for start, _ in offsets], row.trained)
        is_parted = whole != (len(ids), offsets)
        encoded = Encoded(ids, trained, is_parted=is_parted, has_control=row.has_marks, respaced_at=respaced_at)
        return self._fitted(encoded, where)

    def _parted(
        self, text: str, ids: list[int], offsets: list[Offset], border: int, where: str
    ) -> tuple[list[int], list[Offset]]:
        """The same with no token across the border: up to there they are those that the model is asked with."""
        place = bisect_left(offsets, (border, 0)) - 1
        if place < 0 or offsets[place][1] <= border:
            return ids, offsets
        # The text before the border is tokenized by itself, as it will be when the model is asked; then the rest of the
        # token that lay across; the tokens after that stay as they were.
        end = max(stop for start, stop in offsets if start < border)
        after = bisect_left(offsets, (end, 0))
        head = self._tokens(text[:border])
        tail = self._continued(text[border:end])
        if tail is None:
            problem = "a token lies across the border of prompt and answer and cannot be parted there"
            raise Unfit(where, problem, "take the space away with which the prompt ends or the answer begins")
        places = [(border + start, border + stop) for start, stop in tail[1]]
        return [*head[0], *tail[0], *ids[after:]], [*head[1], *places, *offsets[after:]]

    def _tokens(self, text: str) -> tuple[list[int], list[Offset]]:
        if not text.isascii() and MARK.search(text):
            tokens, ids = self._control.encode(text)
            return ids, tokens.offsets
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return found.input_ids, found.offset_mapping

    def _continued(self, text: str) -> tuple[list[int], list[Offset]] | None:
        """Tokens of a text that follows another, so without the space that some tokenizers put before a first word."""
        # A line end keeps the tokenizer from putting its space before the first word, and is taken off again. A text
        # that begins with a line end would be joined to it.
        for before in ("\n", "a"):
            ids, offsets = self._tokens(before + text)
            start = bisect_left(offsets, (1, 0))
            if not start or offsets[start - 1][1] <= 1:
                return ids[start:], [(first - 1, end - 1) for first, end in offsets[start:]]
        return None

    def _refuse_doubles(self, ids: list[int], where: str) -> None:
        bos, eos = self._bos_id, self._eos_id
        if bos is not None and ids[:2] == [bos, bos]:
            name = self._tokenizer.bos_token
            remedy = f"take {name} out of the rows or of the template: one of them is enough"
            raise Unfit(where, f"the row begins with {name} twice: the text has one and another is added", remedy)
        # Only the last tokens are looked at, as templates put a line end or two after EOS; EOS between turns is right.
        if eos is None or ids[-6:].count(eos) < 2:
            return
        if [token for token in ids[-6:] if not self._is_blank(token)][-2:] == [eos, eos]:
            name = self._tokenizer.eos_token
            raise Unfit(where, f"the row ends with {name} twice", f"take one {name} out of the chat template")

    def _fitted(self, encoded: Encoded, where: str) -> list[Encoded]:
        """The row within `max_length`: as it is, cut off, in several rows or, if so told, left out."""
        longest, ids, trained = self.data.max_length, encoded.ids_T, encoded.trained_T
        if len(ids) <= longest:
            return [encoded]
        if self._overlong == "drop":
            raise Excused(where, "it is longer than max_length", "raise max_length")
        if self._overlong == "truncate":
            return [replace(encoded, ids_T=ids[:longest], trained_T=trained[:longest], lost=len(ids) - longest)]
        return [Encoded(ids, [True] * len(ids)) for ids in self._pieces(ids, longest)]

    def _pieces(self, ids: list[int], longest: int) -> Iterator[list[int]]:
        """Rows of about the same length, each after BOS where the tokenizer puts one first."""
        # BOS is taken off and put before each piece: a model has only ever seen text that begins with it.
        start = self._start
        bare = ids[len(start) :] if ids[: len(start)] == start else ids
        count = -(-len(bare) // (longest - len(start)))
        # Pieces of equal length, not full ones and a short rest, which would be trained on almost no context.
        edges = [len(bare) * number // count for number in range(count + 1)]
        return (start + bare[first:end] for first, end in pairwise(edges))

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._tokenizer.decode([token]).strip()
        return self._blank[token]


def _gathered(encoded: Iterator[list[Encoded] | Unfit], count: int) -> list[Encoded] | Unfit:
    """What the `count` texts of a row make; why, if none of them makes anything."""
    made = [next(encoded) for _ in range(count)]
    rows = [row for found in made if not isinstance(found, Unfit) for row in found]
    return rows or next(found for found in made if isinstance(found, Unfit))


def _paired(
    chosen: list[Encoded] | Unfit, rejected: list[Encoded] | Unfit, margin: float, where: str
) -> list[EncodedPair] | Unfit:
    """The pair, unless one of its rows is left out or the cut at `max_length` made them the same."""
    if isinstance(chosen, Unfit):
        return chosen
    if isinstance(rejected, Unfit):
        return rejected
    (better,), (worse,) = chosen, rejected
    if better.ids_T == worse.ids_T:
        return Excused(where, "its two answers are the same once they are cut off", "raise max_length")
    return [EncodedPair(better, worse, margin)]


def end_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens with which an answer ends: EOS and the other special ones."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(special | {tokenizer.eos_token_id})


def _mark(starts: list[int], spans: list[Span]) -> list[bool]:
    """Which tokens begin inside a span; `starts` is the first character of each token."""
    return _marked(len(starts), [(bisect_left(starts, first), bisect_left(starts, end)) for first, end in spans])


def _marked(count: int, places: list[Span]) -> list[bool]:
    trained = [False] * count
    for first, end in places:
        trained[first:end] = [True] * (end - first)
    return trained


def _places(tokens: Encoding, spans: list[Span]) -> list[Span] | None:
    """The first token of each span and the one after its last; None where a span's edge may lie in a token."""
    edges = [_token_from(tokens, edge) for span in spans for edge in span]
    whole = [edge for edge in edges if edge is not None]
    return list(zip(whole[::2], whole[1::2], strict=True)) if len(whole) == len(edges) else None


def _token_from(tokens: Encoding, character: int) -> int | None:
    """The token that begins at a character, all before it having ended there; their count where the text ends there.

    It is asked for, as a list of all tokens' characters is far more work. None where there is no such token.
    """
    if character == 0:
        return 0
    token = tokens.char_to_token(character)
    begins = None if token is None else tokens.token_to_chars(token)
    if token is None:
        token, begins = len(tokens), (character, character)
    before = tokens.token_to_chars(token - 1) if token else None
    if begins is None or before is None or begins[0] != character or before[0] >= character or before[1] > character:
        return None
    return token
