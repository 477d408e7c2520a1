"""The chat templates that a recipe can name, as Jinja text."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.rows.conversations import agreed_arguments, row_format
from ftlaunch.safety import trust

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

PLAIN = r"""{%- for message in messages -%}
{{- message['content'] + (eos_token if message['role'] == 'assistant' else '') -}}
{%- endfor -%}"""
"""What `template = "none"` makes of turns, as a template: their texts end to end, EOS after each answer."""


def trained_template(tokenizer: Any, datas: Collection[Data]) -> str | None:
    """The chat template for a model that was trained on data sets, so that it is asked as it was trained.

    The first one that they name, with the `template_arguments` in which they agree as defaults; the tokenizer's own
    for texts.
    """
    spoken = [data for data in datas if row_format(data) != "text"] or datas
    if all(data.template == "none" for data in spoken):
        return plain_template(tokenizer)
    for data in spoken:
        if (template := chat_template(tokenizer, data)) is not None:
            return _with_defaults(template, agreed_arguments(spoken))
    return tokenizer.chat_template


def plain_template(tokenizer: Any) -> str:
    """PLAIN, which begins with BOS where the tokenizer itself puts one first."""
    return ("{{- bos_token -}}" if added_bos(tokenizer) else "") + PLAIN


def _with_defaults(template: str, arguments: Mapping[str, object]) -> str:
    """The template with values for variables that it is not given."""
    given = (
        f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}"
        for name, value in arguments.items()
        if name.isidentifier()
    )
    # The empty output keeps white space with which the template itself may begin.
    return "".join([*given, "{{- '' }}"]) + template if arguments else template


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


def end_tokens(tokenizer: Any, template: str | None) -> frozenset[int]:
    """Tokens with which an answer ends: EOS, and the special token that the template puts after an answer."""
    ends = {token for token in (tokenizer.eos_token_id,) if token is not None}
    if template is not None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        try:
            ids = tokenizer.apply_chat_template(turns, chat_template=template, return_dict=False)
        except (TemplateError, TypeError, ValueError):
            return frozenset(ends)  # a template that these turns do not suit
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        last = max((place for place, token in enumerate(ids) if token in special), default=None)
        if last is not None and not tokenizer.decode(ids[last + 1 :]).strip():
            ends.add(ids[last])
    return frozenset(ends)


def _chatml(tokenizer: Any) -> str:
    known = tokenizer.backend_tokenizer.token_to_id("<|im_end|>") is not None
    bos = "{{- bos_token -}}" if added_bos(tokenizer) else ""
    return bos + CHATML.replace("END", "'<|im_end|>'" if known else "eos_token")


def _own_template(tokenizer: Any) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        remedy = 'set template = "chatml", "llama2", "none" or the path of a Jinja file in the data table'
        if isinstance(tokenizer.chat_template, dict):
            named = ", ".join(tokenizer.chat_template)
            message = f"the tokenizer has several chat templates, {named}, and none of them is the default"
            raise UserError(message, "write the one that is meant to a Jinja file, and name it as template") from error
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


def added_bos(tokenizer: Any) -> str:
    """The BOS token's text if the tokenizer puts it before a text, else ""."""
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if begins else ""
