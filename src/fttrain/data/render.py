"""A row → the text that the model is trained on, and where in it the trained answers lie."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError

from ftlaunch.recipe.data import Data
from ftlaunch.rows.conversations import conversation_of, row_format, text_of
from ftlaunch.rows.messages import REASONING, Conversation, Turn
from ftlaunch.rows.pairs import Pair
from ftlaunch.rows.template import Row, Unfit
from fttrain.data import audit
from fttrain.data.control import MARK, control_tokens
from fttrain.data.skeleton import Rendered, Skeletons, Span
from fttrain.data.templates import added_bos, chat_template

OTHER_TEMPLATE = 'use another template: "chatml", "llama2", "none" or a file'
KEEPING = "use a template that keeps it (template = a Jinja file), or take it out of the rows if it is not to be learnt"
RESERVED = frozenset(
    (
        *("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        "tokenizer_kwargs",
    )
)
"""Names that a column may not take from the renderer; nor may it those of special tokens, such as bos_token."""


GIVEN = {"tools": "the definitions of tools", "documents": "the documents"}
"""Fields that are there for the template alone, so that it must ask for them."""

OPENING = 40
"""Last characters of a generation prompt that may be the beginning of the answer, such as <think>."""


class Renderer:
    """Writes the rows of one data set as text. Raises Unfit where a row cannot be written with all that it holds."""

    def __init__(self, tokenizer: Any, data: Data) -> None:
        self.template = chat_template(tokenizer, data)
        """Jinja text; None where the row's text is taken as it is."""
        self._data = data
        self._tokenizer = tokenizer
        self._bos = added_bos(tokenizer)
        self._control = control_tokens(tokenizer)
        self._tail = re.compile(rf"(?:(?:{self._control.either})\s*)+$")
        templates = (data.prompt, data.completion, data.chosen, data.rejected, data.system)
        self._written = Counter(token for template in templates for token in self._control.found(template or ""))
        reserved = RESERVED | set(tokenizer.special_tokens_map)
        self._asked = set(re.findall(r"[A-Za-z_]\w*", self.template or "")) - reserved
        self._skeletons = Skeletons(self.template, self._through_template)

    def row(self, row: Row, where: str) -> list[Rendered]:
        """The texts that a row is trained on: one, or one for each answer under a template that rewrites history."""
        if row_format(self._data) == "text":
            text = self._begun(self._ended(text_of(self._data, row, where)))
            return [Rendered(text, [(0, len(text))])]
        return self._conversation(conversation_of(self._data, row, where), where)

    def pair(self, pair: Pair, where: str) -> tuple[Rendered, Rendered]:
        """The texts of the chosen and of the rejected answer."""
        (chosen,), (rejected,) = (self._conversation(side, where) for side in (pair.chosen, pair.rejected))
        return chosen, rejected

    def prompt(self, conversation: Conversation, where: str) -> Rendered:
        """The text that stands when the model begins its answer; nothing of it is trained."""
        safe = self._without_control(conversation, where)
        if self.template is None:
            text = self._begun("".join(turn["content"] for turn in safe.turns))
        else:
            text = self._render(safe, where, add_generation_prompt=True)
        self._refuse_loss(self._left_out(safe, text), where)
        return Rendered(text, [], has_marks=safe is not conversation)

    def _begun(self, text: str) -> str:
        """The text after one BOS, where the tokenizer puts one first."""
        if not self._bos:
            return text
        while text.startswith(self._bos):
            text = text.removeprefix(self._bos)
        return self._bos + text

    def _ended(self, text: str) -> str:
        """The text with one EOS at its end."""
        eos = self._tokenizer.eos_token
        while (bare := text.rstrip()).endswith(eos):
            text = bare.removesuffix(eos)
        return text + eos

    def _conversation(self, conversation: Conversation, where: str) -> list[Rendered]:
        if not any(map(self._control.found, self._texts(conversation))):
            return self._rendered(conversation, where)
        bare = self._without_ends(conversation)
        safe = self._without_control(bare, where)
        return [replace(row, has_marks=safe is not bare) for row in self._rendered(safe, where)]

    def _rendered(self, conversation: Conversation, where: str) -> list[Rendered]:
        if self.template is None:
            plain = self._plain(conversation, where)
            self._refuse_loss(self._left_out(conversation, plain.text), where)
            return [plain]
        if not (self._asked | GIVEN.keys()) & conversation.fields.keys():
            filled = self._skeletons.filled(conversation)
            if filled is not None:
                return [filled]
        return self._through_template(conversation, where)

    def _through_template(self, conversation: Conversation, where: str = "") -> list[Rendered]:
        text = self._render(conversation, where)
        self._refuse_loss(self._left_out(conversation, text), where)
        wanted = self._trained_turns(conversation)
        spans = [self._span(conversation, index, text, where) for index in wanted]
        if self._data.train_on == "all":
            # The thoughts of earlier answers may be cut, as they are at inference; those of the newest are trained.
            newest = len(conversation.turns) - 1
            if conversation.turns[newest]["role"] == "assistant" and newest not in conversation.untrained:
                self._refuse_loss(audit.left_out_of_answer(conversation.turns[newest], text), where)
            untrained = [self._span(conversation, index, text, where) for index in sorted(conversation.untrained)]
            if None in untrained:
                raise self._rewritten(where)
            others = _others([span for span in untrained if span], len(text))
            answers = [turn for index, turn in enumerate(conversation.turns) if index not in conversation.untrained]
            is_respaced = any(_is_respaced(one, (0, len(text)), text) for one in answers if one["role"] == "assistant")
            return [Rendered(text, others, is_respaced=is_respaced)]
        if None not in spans:
            found = [span for span in spans if span]
            answers = [conversation.turns[index] for index in wanted]
            is_respaced = any(_is_respaced(*one, text) for one in zip(answers, found, strict=True))
            return [Rendered(text, found, is_respaced=is_respaced)]
        if wanted == [len(conversation.turns) - 1]:
            raise self._rewritten(where)
        return [self._last_answer(conversation.up_to(index + 1), where) for index in wanted]

    def _left_out(self, conversation: Conversation, text: str) -> str | None:
        """What the whole text of a conversation does not hold; None where it holds all."""
        # A tool's name proves nothing where an answer calls the tool: the template has to ask for the definitions.
        unasked = (what for key, what in GIVEN.items() if conversation.fields.get(key) and key not in self._asked)
        return next(unasked, None) or audit.left_out_of_prompt(conversation, text)

    def _last_answer(self, conversation: Conversation, where: str) -> Rendered:
        """The text up to an answer, rendered as it is when that answer is the newest, and trained only there."""
        text = self._render(conversation, where)
        span = self._span(conversation, len(conversation.turns) - 1, text, where)
        if span is None:
            raise self._rewritten(where)
        return Rendered(text, [span], is_respaced=_is_respaced(conversation.turns[-1], span, text))

    def _rewritten(self, where: str) -> Unfit:
        problem = "the chat template writes the turns before an answer in another way once the answer is there"
        return Unfit(where, f"{problem}: it cannot be told which tokens are the answer's", OTHER_TEMPLATE)

    def _trained_turns(self, conversation: Conversation) -> list[int]:
        """The assistant turns whose text must be found."""
        turns = conversation.turns
        first = len(turns) - 1 if self._data.train_on == "answer" else 0
        answers = [index for index in range(first, len(turns)) if turns[index]["role"] == "assistant"]
        return [] if self._data.train_on == "all" else [one for one in answers if one not in conversation.untrained]

    def _plain(self, conversation: Conversation, where: str) -> Rendered:
        """The turns' texts end to end; EOS follows each answer."""
        text, spans = "", dict[int, Span]()
        for index, turn in enumerate(conversation.turns):
            start = len(text)
            is_answer = turn["role"] == "assistant"
            said = self._ended(turn["content"]) if is_answer else turn["content"]
            text += said if index else self._begun(said)
            if is_answer:
                spans[index] = (start, len(text))
                self._refuse_loss(audit.left_out_of_answer(turn, said), where)
        if self._data.train_on == "all":
            return Rendered(text, _others([spans[one] for one in sorted(conversation.untrained)], len(text)))
        return Rendered(text, [spans[index] for index in self._trained_turns(conversation)])

    def _span(self, conversation: Conversation, index: int, text: str, where: str) -> Span | None:
        """All that the template writes for a turn after the generation prompt, its end-of-turn token included.

        None where the whole text begins otherwise than the text up to there. Raises Unfit where the turn is not whole.
        """
        before = self._render(conversation.up_to(index), where, add_generation_prompt=True)
        is_last = index == len(conversation.turns) - 1
        through = text if is_last else self._render(conversation.up_to(index + 1), where)
        if not (text.startswith(before) and text.startswith(through) and len(before) < len(through)):
            self._refuse_loss(audit.left_out_of_answer(conversation.turns[index], through), where)
            return None
        answer = through[len(before) :]
        if (lost := audit.left_out_of_answer(conversation.turns[index], answer)) is not None:
            opened = before[-OPENING:] + answer
            self._refuse_loss(audit.left_out_of_answer(conversation.turns[index], opened) and lost, where)
        return len(before), len(through)

    def _refuse_loss(self, lost: str | None, where: str) -> None:
        if lost is not None:
            template = 'template = "none"' if self.template is None else "the chat template"
            raise Unfit(where, f"{template} leaves out {lost}", KEEPING)

    def _render(self, conversation: Conversation, where: str, *, add_generation_prompt: bool = False) -> str:
        fields = conversation.fields
        variables = {**self._data.template_arguments, **{key: fields[key] for key in self._asked & fields.keys()}}

        def render(turns: list[Turn]) -> str:
            text = self._tokenizer.apply_chat_template(
                turns,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
            try:
                text.encode()
            except UnicodeEncodeError as error:
                problem = "a call, a thought or the definition of a tool holds half a character"
                raise Unfit(where, problem, "write the file again as UTF-8 (a lone \\ud800-\\udfff)") from error
            return text

        turns = conversation.turns
        try:
            return render(turns)
        except (TemplateError, TypeError) as error:
            # Some templates join arguments to a text. Each conversation is tried by itself, so that what a row becomes
            # does not depend on the rows that the same process rendered before it.
            if any("tool_calls" in turn for turn in turns):
                with suppress(TemplateError, TypeError):
                    return render(_with_text_arguments(turns))
            remedy = f"mend the row, or {OTHER_TEMPLATE}"
            raise Unfit(where, f"the chat template refuses the conversation: {error}", remedy) from error

    def _without_ends(self, conversation: Conversation) -> Conversation:
        """The conversation without end tokens at the end of answers, as they are added."""
        turns = [
            {**turn, "content": self._tail.sub("", turn["content"])} if turn["role"] == "assistant" else turn
            for turn in conversation.turns
        ]
        return Conversation(turns, conversation.fields, conversation.untrained)

    def _without_control(self, conversation: Conversation, where: str) -> Conversation:
        """The conversation, with marks for the control tokens that it holds as text. Raises Unfit unless told so.

        What a turn says may not be read as control: a user could end the own turn and speak for the assistant.
        """
        found = [Counter(self._control.found(text)) - self._written for text in self._texts(conversation)]
        name = next((token for one in found for token in one), None)
        if name is None:
            return conversation
        # Tokens that the recipe's own templates write are control: which of two the row wrote cannot be told.
        has_marks = any(map(MARK.search, self._texts(conversation)))
        if self._data.control_tokens == "text" and not self._written and not has_marks:
            return self._control.masked(conversation)
        remedy = 'leave such rows out, or write control_tokens = "text" in the data table to have it as plain text'
        if self._data.control_tokens == "text":
            reason = "it holds private characters" if has_marks else "the row's templates write some, too"
            remedy = f'leave such rows out: control_tokens = "text" cannot keep it apart, as {reason}'
        raise Unfit(where, f"the text of a turn holds the control token {name}", remedy)

    def _texts(self, conversation: Conversation) -> Iterator[str]:
        """What turns say, and the fields that reach the template."""
        for turn in conversation.turns:
            yield from _texts(turn)
        for key in (self._asked | {"tools"}) & conversation.fields.keys():
            yield str(conversation.fields[key])


def _is_respaced(turn: Turn, span: Span, text: str) -> bool:
    """Whether the span of a trained answer has other white space than the row."""
    said, opened = (text[max(0, start) : span[1]] for start in (span[0], span[0] - OPENING))
    whole = next((part for part in (said, opened) if audit.stands_in(turn["content"], part)), None)
    return whole is not None and audit.is_respaced(turn, whole)


def _texts(turn: Turn) -> Iterator[str]:
    yield turn["content"]
    yield from (turn[key] for key in REASONING if isinstance(turn.get(key), str))
    if calls := turn.get("tool_calls"):
        yield json.dumps(calls, ensure_ascii=False, default=str)


def _with_text_arguments(turns: list[Turn]) -> list[Turn]:
    """The turns with the arguments of their calls as JSON text."""

    def written(call: Row) -> Row:
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}

    return [
        {**turn, "tool_calls": [written(call) for call in turn["tool_calls"]]} if "tool_calls" in turn else turn
        for turn in turns
    ]


def _others(spans: list[Span], length: int) -> list[Span]:
    """What lies between the spans, which come in order."""
    edges = [0, *(edge for span in spans for edge in span), length]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
