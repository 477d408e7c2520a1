"""Control tokens that stand in what people say, encoded as the text that they are and never as control.

While a conversation is rendered, marks of the same length stand for them, so that the control tokens in the rendered
text are the template's own. Then a copy of the tokenizer, which takes no text for control, encodes it with the
template's control tokens as marks and what was said as it is.
"""

import re
from functools import cached_property, lru_cache
from typing import Any, cast

from tokenizers import AddedToken, Encoding, Tokenizer

from ftlaunch.rows.messages import Conversation, Turn

# Characters of the private planes 15 and 16, which no text has in earnest.
SAID, MEANT = 0xF0000, 0x100000
MARK = re.compile("[\U000f0000-\U0010fffd]")


class ControlTokens:
    """The special tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder.items()
        self._tokens = {token.content: (id_, token) for id_, token in added if token.special}
        names = sorted(self._tokens, key=len, reverse=True)
        self.either = "|".join(map(re.escape, names)) or "(?!)"
        """A pattern of any of them."""
        self._pattern = re.compile(self.either)
        self._number = {name: number for number, name in enumerate(names)}
        self._names = names
        self._backend: Tokenizer = tokenizer.backend_tokenizer

    def found(self, text: str) -> list[str]:
        """Those in a text."""
        return self._pattern.findall(text)

    def masked(self, conversation: Conversation) -> Conversation:
        """The conversation with a mark in the place of each control token that it holds, calls and fields included."""
        turns = [
            cast(Turn, {key: value if key == "role" else self._masked(value) for key, value in turn.items()})
            for turn in conversation.turns
        ]
        fields = {key: self._masked(value) for key, value in conversation.fields.items()}
        return Conversation(turns, fields, conversation.untrained)

    def _masked(self, value: object) -> object:
        match value:
            case str():
                return self._pattern.sub(lambda token: self._mark(SAID, token[0]), value)
            case dict():
                return {key: self._masked(one) for key, one in value.items()}
            case list():
                return [self._masked(one) for one in value]
            case _:
                return value

    def _mark(self, plane: int, name: str) -> str:
        """Return a mark as long as the token's name, so that places in a text stay what they are."""
        return chr(plane + self._number[name]) * len(name)

    def encode(self, text: str) -> tuple[Encoding, list[int]]:
        """The tokens of a text with marks, and their ids."""
        text = self._pattern.sub(lambda token: self._mark(MEANT, token[0]), text)
        for name in {self._names[ord(mark) - SAID] for mark in MARK.findall(text) if ord(mark) < MEANT}:
            text = text.replace(self._mark(SAID, name), name)
        tokens = self._blind.encode(text, add_special_tokens=False)
        return tokens, [self._meant.get(token, token) for token in tokens.ids]

    @cached_property
    def _blind(self) -> Tokenizer:
        """A copy of the tokenizer that takes no text for control, and knows a mark for each control token."""
        blind = Tokenizer.from_str(self._backend.to_str())
        blind.no_truncation()
        blind.no_padding()
        blind.add_tokens([self._like(token, self._mark(MEANT, name)) for name, (_, token) in self._tokens.items()])
        blind.encode_special_tokens = True
        return blind

    @cached_property
    def _meant(self) -> dict[int, int]:
        """The copy's ids of marks → those of control tokens."""
        marks = {self._mark(MEANT, name): id_ for name, (id_, _) in self._tokens.items()}
        return {cast(int, self._blind.token_to_id(mark)): id_ for mark, id_ in marks.items()}

    def _like(self, token: Any, mark: str) -> AddedToken:
        flags = {"single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip}
        return AddedToken(mark, normalized=token.normalized, special=False, **flags)


@lru_cache(maxsize=4)
def control_tokens(tokenizer: Any) -> ControlTokens:
    """The special tokens of a tokenizer, whose copy is made once."""
    return ControlTokens(tokenizer)
