"""Texts that are put together from skeletons, against the same rows rendered one by one."""

from typing import Any

import pytest

from ftlaunch.recipe.data import Data
from ftlaunch.rows.template import Unfit
from fttrain.data.blind import blindness
from fttrain.data.render import Renderer
from fttrain.data.skeleton import Rendered, Skeletons
from fttrain.data.templates import CHATML, LLAMA2

HEADS = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chatml(said: str, *, before: str = "", inside: str = "") -> str:
    return f"{before}{HEADS}{inside}{{{{ {said} }}}}<|im_end|>\n{{% endfor %}}{ASKS}"


BLIND = {
    "chatml": CHATML.replace("END", "'<|im_end|>'"),
    "llama2": LLAMA2,
    "a default system turn": chatml(
        "m['content']",
        before="{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}",
    ),
    "llama3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|im_end|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
    ),
    "the system turn in a namespace": (
        "{% set ns = namespace(system='none') %}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{% set ns.system = m['content'] %}{% endif %}{% endfor %}{{ bos_token ~ ns.system }}"
        "{% for m in messages %}{% if m['role'] == 'user' and m['content'] is not none %}[{{ m['content'].strip() }}]"
        "{% elif m['role'] == 'assistant' %}{% generation %}({{ m.get('content') }}){{ eos_token }}{% endgeneration %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{% endif %}"
    ),
    "a template that knows tools": (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
        "{% if m.role in ['user', 'system'] or not m.tool_calls %}<{{ m.role }}>{{ m.content }}<|im_end|>"
        "{% elif 'tool_calls' in m %}{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    ),
}
SEEING = {
    "one of two namespaces": chatml(
        "m.content", before="{% set a = namespace(x=1) %}{% set b = namespace(x=2) %}{{ (a if tools else b).x }}"
    ),
    "a thought is cut out": chatml("m.content.split('</think>')[-1]"),
    "a content is asked what it holds": chatml(
        "m.content", inside="{% if '</think>' in m.content %}(thinks){% endif %}"
    ),
    "a content is compared": chatml("m.content", inside="{% if m.content == 'Hi.' %}(greets){% endif %}"),
    "a content is measured": chatml("m.content", inside="{{ m.content | length }}"),
    "a content is changed": chatml("m.content | upper"),
    "a content is repeated": chatml("m.content * 2"),
    "a content is written as JSON": chatml("m.content | tojson"),
    "a turn is written as JSON": chatml("m.content", inside="{{ m | tojson }}"),
    "a turn is asked for all it has": chatml("m.content", inside="{{ m.values() | list }}"),
    "turns are picked by what they say": chatml("m.content", before="{{ messages | map(attribute='content') | join }}"),
    "turns are sorted by what they say": chatml(
        "m.content", before="{{ (messages | selectattr('content', 'equalto', 'Hi.') | list | length) }}"
    ),
    "the time is told": chatml("m.content", before="{{ strftime_now('%H:%M:%S') }}"),
    "the content is hidden in a list": chatml("m.content", inside="{% set ns = [m.content] %}{{ ns[0] | length }}"),
    "the content is hidden in a namespace": chatml(
        "m.content", inside="{% set ns = namespace(it=m.content) %}{{ ns.it | length }}"
    ),
    "the content is hidden in a namespace of another name": chatml(
        "m.content",
        before="{% set ns = namespace(it='') %}{% set other = ns %}",
        inside="{% set ns.it = m.content %}{{ other.it | length }}",
    ),
    "the content is a variable's second value": chatml(
        "it", before="{% set it = '' %}", inside="{{ it | length }}{% set it = m.content %}"
    ),
    "a neighbour of the loop": chatml(
        "m.content", inside="{% if loop.nextitem %}{{ loop.nextitem | tojson }}{% endif %}"
    ),
    "a macro": chatml("say(m)", before="{% macro say(m) %}{{ m.content | length }}{% endmacro %}"),
    "no template": "{% for",
}
CHATS: list[list[tuple[str, str]]] = [
    [("user", "Hi."), ("assistant", "Hello.")],
    [("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello.")],
    [
        ("user", "1 \ue000 1\ue001"),
        ("assistant", "{{ bos_token }} {% if"),
        ("user", "0"),
        ("assistant", "ünï 漢字 🙂\n"),
    ],
    [("user", " padded "), ("assistant", "\n\tanswer \x1f"), ("user", "Hi."), ("assistant", "</think>")],
    [("system", " "), ("user", "Hi."), ("assistant", "Hello.")],
    [("user", "Hi."), ("user", "Hi again."), ("assistant", "Hello.")],
]


def conversation(turns: list[tuple[str, str]]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def renderer(tokenizer: Any, template: str, tmp_path: Any, train_on: str) -> Renderer:
    path = tmp_path / "template.jinja"
    path.write_text(template)
    return Renderer(tokenizer, Data(path="x", format="messages", template=str(path), train_on=train_on))  # type: ignore[arg-type]


def outcome(renderer: Renderer, row: dict[str, Any]) -> list[Rendered] | str:
    try:
        return renderer.row(row, "here")
    except Unfit as unfit:
        return str(unfit)


@pytest.mark.parametrize("train_on", ["answer", "assistant", "all"])
@pytest.mark.parametrize("name", BLIND)
def test_a_filled_skeleton_is_what_the_template_renders(
    name: str, train_on: str, tokenizer: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = renderer(tokenizer, BLIND[name], tmp_path, train_on)
    rows = [conversation(turns) for turns in CHATS for _ in range(2)]
    put_together = [outcome(fast, row) for row in rows]
    monkeypatch.setattr(Skeletons, "filled", lambda *_: None)
    assert put_together == [outcome(renderer(tokenizer, BLIND[name], tmp_path, train_on), row) for row in rows]
    assert blindness(BLIND[name]) is not None


@pytest.mark.parametrize("name", SEEING)
def test_a_template_that_looks_at_contents_has_no_skeleton(name: str) -> None:
    assert blindness(SEEING[name]) is None


def test_turns_of_the_same_roles_are_rendered_once(
    tokenizer: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = renderer(tokenizer, BLIND["llama3"], tmp_path, "answer")
    rendered: list[Any] = []
    plain = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: (rendered.append(a), plain(*a, **k))[1])
    for number in range(5):
        fast.row(conversation([("user", f"{number}?"), ("assistant", f"{number}.")]), "here")
    assert len(rendered) == 2
    fast.row(conversation([("user", "padded "), ("assistant", "no")]), "here")
    assert len(rendered) == 4, "the template trims, so this row has no skeleton"
    fast.row({**conversation([("user", "a"), ("assistant", "b")]), "bos_token": "x", "messages_": 1}, "here")
    assert len(rendered) == 4
