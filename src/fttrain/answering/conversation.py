"""Turns of a conversation as the tokens that a model is to go on from."""

from collections.abc import Sequence
from typing import Any, cast

from ftlaunch.errors import UserError
from ftlaunch.rows.messages import Conversation, Turn
from fttrain.data.control import control_tokens

Message = dict[str, str]
"""`role` and `content`."""


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The conversation through the chat template, up to where the answer begins; without a template, its bare text.

    Control tokens in what turns say are encoded as text. UserError where the template refuses the turns, such as a
    system turn that it does not know.
    """
    if not tokenizer.chat_template:
        return text_ids(tokenizer, "\n".join(message["content"] for message in messages))
    control = control_tokens(tokenizer)
    turns = [cast(Turn, message) for message in messages]
    holds_control = any(control.found(message["content"]) for message in messages)
    # Else whoever writes a turn could end it and speak for the assistant.
    turns = control.masked(Conversation(turns)).turns if holds_control else turns
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    # A template is a program: it refuses by TemplateError, and turns that it never expected raise others.
    except Exception as error:
        raise UserError(f"the chat template refuses these turns: {error}", "begin with a user's turn") from error
    return control.encode(text)[1] if holds_control else list(tokenizer(text, add_special_tokens=False)["input_ids"])


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """A bare text as tokens, begun as the tokenizer begins texts; never none."""
    return list(tokenizer(text)["input_ids"]) or [tokenizer.eos_token_id]


def longest_context(model: Any) -> int:
    """Tokens that prompt and answer may have together."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048)
