"""A row → token ids and which of them are trained.

Every conversation is rendered to one text and tokenized once, just as it will be when the model is used; what is
trained follows from where the assistant's turns lie in that text.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from ftlaunch.errors import UserError
from ftlaunch.recipe import Data
from ftlaunch.rows.conversations import Turn, row_format, text_of, turns_of
from ftlaunch.rows.pairs import Pair, Unfit, pair_of
from ftlaunch.rows.template import DataError, Row
from ftlaunch.safety import trust

Span = tuple[int, int]
"""First character and the one after the last."""

LLAMA2 = r"""{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else none -%}
{%- for message in messages[(0 if system is none else 1):] -%}
{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
{{- raise_exception('user and assistant turns must alternate, with no other roles between') -}}
{%- endif -%}
{%- set content = message['content'] | trim -%}
{%- if loop.first and system is not none -%}
{%- set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + content -%}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{- (bos_token or '') + '[INST] ' + content + ' [/INST]' -}}
{%- else -%}
{{- ' ' + content + ' ' + eos_token -}}
{%- endif -%}
{%- endfor -%}"""
"""The form that Llama 2 was trained on: github.com/meta-llama/llama, llama/generation.py, chat_completion."""

CHATML = r"""{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + END + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


@dataclass(frozen=True)
class Encoded:
    """One row as tokens."""

    ids_T: list[int]
    trained_T: list[bool]
    truncated: bool
    """Whether its end was cut off at `max_length`."""


@dataclass(frozen=True)
class EncodedPair:
    """Two rows that differ in their answer."""

    chosen: Encoded
    rejected: Encoded
    margin: float

    @staticmethod
    def of(chosen: Encoded | None, rejected: Encoded | None, margin: float) -> "EncodedPair | Unfit | None":
        """The pair, unless one of its rows is left out or the cut at `max_length` made them the same."""
        if chosen is None or rejected is None:
            return None
        return "identical" if chosen.ids_T == rejected.ids_T else EncodedPair(chosen, rejected, margin)


@dataclass(frozen=True)
class Rendered:
    """One row as text."""

    text: str
    trained: list[Span]


class Encoder:
    """Turns the rows of one data set into tokens.

    Raises UserError where tokenizer and data do not go together, and DataError, naming the row, where a row is unfit.
    """

    def __init__(self, tokenizer: Any, data: Data) -> None:
        if not tokenizer.is_fast:
            remedy = "use a model folder with a tokenizer.json"
            raise UserError("the tokenizer cannot tell which characters a token stands for (it is a slow one)", remedy)
        self.data = data
        self.template = chat_template(tokenizer, data)
        """Jinja text; None where the row's text is taken as it is."""
        self._tokenizer = tokenizer
        self._bos = _added_bos(tokenizer)
        self._end_ids = _end_ids(tokenizer)
        self._blank: dict[int, bool] = {}

    def encode(self, where: str, row: Row) -> Encoded | None:
        """The row as tokens; None where it is longer than `max_length` and such rows are dropped."""
        return self.encode_many([(where, row)])[0]

    def encode_many(self, rows: Sequence[tuple[str, Row]]) -> list[Encoded | None]:
        """`encode` of each row, several times as fast."""
        return self._encode([(where, self._render_row(row, where)) for where, row in rows])

    def encode_pairs(self, rows: Sequence[tuple[str, Row]]) -> list[EncodedPair | Unfit | None]:
        """The pair of each row; why it makes none; None where an answer is longer than `max_length` and dropped."""
        found: list[tuple[str, Pair | Unfit]] = [(where, pair_of(self.data, row, where)) for where, row in rows]
        sides = [
            (where, self._render_turns(turns, where))
            for where, pair in found
            if isinstance(pair, Pair)
            for turns in (pair.chosen, pair.rejected)
        ]
        encoded = iter(self._encode(sides))
        pairs: list[EncodedPair | Unfit | None] = []
        for _, pair in found:
            if isinstance(pair, Pair):
                pairs.append(EncodedPair.of(next(encoded), next(encoded), pair.margin))
            else:
                pairs.append(pair)
        return pairs

    def _encode(self, rendered: Sequence[tuple[str, Rendered]]) -> list[Encoded | None]:
        """Tokens of each text, which comes with its place; None as `encode` says."""
        if not rendered:
            return []
        batch = self._tokenizer(
            [row.text for _, row in rendered],
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        encoded: list[Encoded | None] = []
        for (where, row), ids, offsets in zip(rendered, batch.input_ids, batch.offset_mapping, strict=True):
            self._refuse_double_bos(ids, where)
            encoded.append(self._cut(ids, _mark([start for start, _ in offsets], row.trained)))
        return encoded

    def encode_prompt(self, turns: list[Turn], where: str) -> list[int]:
        """Tokens of the turns as they stand when the model begins its answer."""
        if self.template is None:
            text = self._bos + "".join(turn["content"] for turn in turns)
        else:
            text = self._render(turns, where, add_generation_prompt=True)
        ids = self._tokenizer(text, add_special_tokens=False, truncation=False, padding=False).input_ids
        self._refuse_double_bos(ids, where)
        return ids

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens with which an answer ends: EOS and the other special ones."""
        return self._end_ids

    def is_ended(self, encoded: Encoded) -> bool:
        """Whether the last trained token, white space aside, is one that ends a turn: EOS or another special token."""
        for token, trained in zip(reversed(encoded.ids_T), reversed(encoded.trained_T), strict=True):
            if trained and not self._is_blank(token):
                return token in self._end_ids
        return False

    def _render_row(self, row: Row, where: str) -> Rendered:
        if row_format(self.data) == "text":
            text = self._bos + text_of(self.data, row, where) + self._tokenizer.eos_token
            return Rendered(text, [(0, len(text))])
        return self._render_turns(turns_of(self.data, row, where), where)

    def _render_turns(self, turns: list[Turn], where: str) -> Rendered:
        if self.template is None:
            return self._plain(turns)
        text = self._render(turns, where)
        return Rendered(text, self._spans(turns, text, where))

    def _plain(self, turns: list[Turn]) -> Rendered:
        """The turns' texts end to end; EOS follows each answer."""
        text, spans = self._bos, []
        for turn in turns:
            start = len(text)
            is_answer = turn["role"] == "assistant"
            text += turn["content"] + (self._tokenizer.eos_token if is_answer else "")
            if is_answer:
                spans.append((start, len(text)))
        return Rendered(text, {"answer": spans[-1:], "assistant": spans, "all": [(0, len(text))]}[self.data.train_on])

    def _spans(self, turns: list[Turn], text: str, where: str) -> list[Span]:
        """Where the trained turns lie in the text of all turns."""
        if self.data.train_on == "all":
            return [(0, len(text))]
        first = len(turns) - 1 if self.data.train_on == "answer" else 0
        answers = [index for index in range(first, len(turns)) if turns[index]["role"] == "assistant"]
        return [self._span(turns, index, text, where) for index in answers]

    def _span(self, turns: list[Turn], index: int, text: str, where: str) -> Span:
        """All that the template writes for a turn after the generation prompt, its end-of-turn token included."""
        before = self._render(turns[:index], where, add_generation_prompt=True)
        through = text if index == len(turns) - 1 else self._render(turns[: index + 1], where)
        if text.startswith(before) and text.startswith(through) and len(before) < len(through):
            return len(before), len(through)
        problem = f"the chat template writes earlier turns differently once turn {index + 1} follows"
        remedy = 'train_on = "answer" may do, or train_on = "all"; else use template = "chatml" or a template file'
        raise DataError(where, f"{problem}: it cannot be told which tokens are the assistant's", remedy)

    def _render(self, turns: list[Turn], where: str, *, add_generation_prompt: bool = False) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                turns, chat_template=self.template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError) as error:
            remedy = 'mend the row, or use another template: "chatml", "llama2", "none" or a file'
            raise DataError(where, f"the chat template refuses the conversation: {error}", remedy) from error

    def _refuse_double_bos(self, ids: list[int], where: str) -> None:
        bos = self._tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            name = self._tokenizer.bos_token
            remedy = f"take {name} out of the rows or of the template: one of them is enough"
            raise DataError(where, f"the row begins with {name} twice: the text has one and another is added", remedy)

    def _cut(self, ids: list[int], trained: list[bool]) -> Encoded | None:
        longest = self.data.max_length
        if len(ids) <= longest:
            return Encoded(ids, trained, truncated=False)
        if self.data.overlong == "drop":
            return None
        return Encoded(ids[:longest], trained[:longest], truncated=True)

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._tokenizer.decode([token]).strip()
        return self._blank[token]


def chat_template(tokenizer: Any, data: Data) -> str | None:
    """The Jinja text of `data.template`; None for "none" and for format "text".

    "chatml" ends turns with `<|im_end|>` where that is a token, else with the tokenizer's EOS, and begins with BOS
    where the tokenizer itself adds one. Raises UserError where the tokenizer lacks what the template needs.
    """
    if row_format(data) == "text" or data.template == "none":
        _require_eos(tokenizer)
        _refuse_open_end(data)
        return None
    if data.template == "tokenizer":
        return _own_template(tokenizer)
    if data.template not in ("llama2", "chatml"):
        return _template_file(Path(data.template).expanduser())
    _require_eos(tokenizer)
    return LLAMA2 if data.template == "llama2" else _chatml(tokenizer)


def _chatml(tokenizer: Any) -> str:
    known = tokenizer.backend_tokenizer.token_to_id("<|im_end|>") is not None
    bos = "{{- bos_token -}}" if _added_bos(tokenizer) else ""
    return bos + CHATML.replace("END", "'<|im_end|>'" if known else "eos_token")


def _own_template(tokenizer: Any) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        remedy = 'set template = "chatml", "llama2", "none" or the path of a Jinja file in the data table'
        raise UserError("the tokenizer has no chat template of its own", remedy) from error


def _template_file(path: Path) -> str:
    trust.require(path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        remedy = 'name a Jinja file, or write template = "tokenizer", "llama2", "chatml" or "none"'
        raise UserError(f"the chat template {path} cannot be read: {error}", remedy) from error


def _require_eos(tokenizer: Any) -> None:
    if tokenizer.eos_token is None:
        remedy = "set eos_token in the model's tokenizer_config.json"
        raise UserError("the tokenizer has no end token: the model could not learn to stop", remedy)


def _refuse_open_end(data: Data) -> None:
    if row_format(data) == "prompt" and data.prompt and data.prompt.endswith(" "):
        remedy = 'move the space: end `prompt` without it and write `completion = " {…}"`'
        raise UserError("`prompt` ends with a space, which tokenizers join to the answer's first word", remedy)


def _added_bos(tokenizer: Any) -> str:
    """The BOS token's text if the tokenizer puts it before a text, else ""."""
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if begins else ""


def _end_ids(tokenizer: Any) -> frozenset[int]:
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(special | {tokenizer.eos_token_id})


def _mark(starts: list[int], spans: list[Span]) -> list[bool]:
    """Which tokens begin inside a span; `starts` is the first character of each token."""
    trained = [False] * len(starts)
    for first, end in spans:
        inside = range(bisect_left(starts, first), bisect_left(starts, end))
        trained[inside.start : inside.stop] = [True] * len(inside)
    return trained
