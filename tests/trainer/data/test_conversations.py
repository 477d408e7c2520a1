"""What a conversation holds reaches the template, and is found in the tokens: tools, calls, thoughts, weights, ends."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.in_process import encode_row
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ftlaunch.recipe.data import Data
from ftlaunch.rows.messages import Conversation
from ftlaunch.rows.template import Unfit
from fttrain.data.chat import Encoded, EncodedPair, Encoder

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for d in documents or [] %}<|im_start|>system\n{{ d.text }}<|im_end|>\n{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<|im_start|>system\nno thinking<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"city": {"type": "string"}}}}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
USER = {"role": "user", "content": "Weather in Rome?"}
WRITTEN = '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call><|im_end|>\n'


def answer(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Any) -> Any:
    return make_tokenizer(chat_template=TEMPLATE)


def encoded(tokenizer: Any, row: dict[str, Any], **fields: Any) -> list[Encoded]:
    data = Data(**{"path": "rows.jsonl", "format": "messages", **fields})
    return encode_row(Encoder(tokenizer, data), row)


def texts(tokenizer: Any, rows: list[Encoded]) -> list[tuple[str, str]]:
    """(all text, trained text) of each row."""
    trained = [[token for token, mark in zip(row.ids_T, row.trained_T, strict=True) if mark] for row in rows]
    return [(tokenizer.decode(row.ids_T), tokenizer.decode(ids)) for row, ids in zip(rows, trained, strict=True)]


def only(tokenizer: Any, row: dict[str, Any], **fields: Any) -> tuple[str, str]:
    (found,) = texts(tokenizer, encoded(tokenizer, row, **fields))
    return found


@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER]), [json.dumps(WEATHER)]])
def test_tools_reach_the_template(tools: Any, tokenizer: Any) -> None:
    row = {"messages": [USER, answer("call get_weather")], "tools": tools}
    text, _ = only(tokenizer, row)
    assert text.startswith(f"<|im_start|>system\n{json.dumps([WEATHER])}<|im_end|>\n<|im_start|>user")
    data = Data(path="x", format="messages")
    prompt = Encoder(tokenizer, data).encode_prompt(Conversation([USER], {"tools": [WEATHER]}), "row")
    assert text.startswith(tokenizer.decode(prompt))
    pair = {"chosen": [USER, answer("a")], "rejected": [USER, answer("b")], "tools": tools}
    (made,) = Encoder(tokenizer, Data(path="x", format="preference")).encode_pairs([("row", pair)])
    assert isinstance(made, list)
    assert isinstance(made[0], EncodedPair)
    assert json.dumps([WEATHER]) in tokenizer.decode(made[0].rejected.ids_T)


def test_other_variables_reach_the_template(tokenizer: Any) -> None:
    row: dict[str, Any] = {"messages": [USER, answer("Fine.")], "documents": [{"text": "Rome is sunny."}]}
    assert "Rome is sunny." in only(tokenizer, row)[0]
    assert "no thinking" in only(tokenizer, row, template_arguments={"enable_thinking": False})[0]
    row["chat_template_kwargs"] = {"enable_thinking": True}
    assert "no thinking" not in only(tokenizer, row, template_arguments={"enable_thinking": False})[0]
    row["chat_template_kwargs"] = '{"enable_thinking": false}'
    assert "no thinking" in only(tokenizer, row)[0]


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}], ids=str)
@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'], ids=str)
def test_a_turn_may_be_only_a_call(content: dict[str, Any], arguments: Any, tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    turn = {"role": "assistant", **content, "tool_calls": [call]}
    row = {"messages": [USER, turn, {"role": "tool", "content": ""}, answer("18 °C.")], "tools": [WEATHER]}
    assert only(tokenizer, row, train_on="assistant")[1] == f"{WRITTEN}18 °C.<|im_end|>\n"
    assert only(tokenizer, {"messages": row["messages"][:2], "tools": [WEATHER]})[1] == WRITTEN


def test_sharegpt_calls_are_calls(tokenizer: Any) -> None:
    said = [
        {"from": "human", "value": "Weather in Rome?"},
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": "18 C"},
        {"from": "gpt", "value": "Fine."},
    ]
    text, trained = only(tokenizer, {"conversations": said}, format="sharegpt", train_on="assistant")
    assert trained == f"{WRITTEN}Fine.<|im_end|>\n"
    assert "<|im_start|>tool\n18 C<|im_end|>" in text


def test_a_template_that_joins_arguments_to_a_text_gets_a_text(make_tokenizer: Any) -> None:
    joined = TEMPLATE.replace(
        "{{ call.function | tojson }}", "{{ call.function.name + ' ' + call.function.arguments }}"
    )
    row = {"messages": [USER, answer(None, tool_calls=[CALL])], "tools": [WEATHER]}
    tokenizer = make_tokenizer(chat_template=joined)
    assert only(tokenizer, row)[1] == '<tool_call>get_weather {"city": "Rome"}</tool_call><|im_end|>\n'


def test_parts_of_a_content_are_one_text(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "Weather "}, {"type": "text", "text": "in Rome?"}]
    row = {"messages": [{"role": "user", "content": parts}, answer([{"type": "text", "text": "Fine."}])]}
    assert only(tokenizer, row) == only(tokenizer, {"messages": [USER, answer("Fine.")]})
    row["messages"][0]["content"] = [{"type": "image_url", "image_url": "x"}]
    with pytest.raises(Unfit, match="part of type 'image_url'"):
        encoded(tokenizer, row)


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize("off", [0, False, 0.0])
def test_turns_without_weight_are_not_trained(key: str, off: Any, tokenizer: Any) -> None:
    turns = [USER, answer("5", **{key: off}), {"role": "user", "content": "no"}, answer("4", **{key: 1})]
    assert only(tokenizer, {"messages": turns}, train_on="assistant")[1] == "4<|im_end|>\n"
    everything = only(tokenizer, {"messages": turns}, train_on="all")[1]
    assert "5" not in everything
    assert "4" in everything
    text, trained = only(tokenizer, {"messages": turns}, train_on="assistant", template="none")
    assert (text, trained) == ("Weather in Rome?5<|im_end|>no4<|im_end|>", "4<|im_end|>")
    turns[-1][key] = off
    with pytest.raises(Unfit, match="the last answer has weight 0"):
        encoded(tokenizer, {"messages": turns})


def test_half_a_weight_is_refused(tokenizer: Any) -> None:
    with pytest.raises(Unfit, match=r"weight\] is 0.5, neither 0 nor 1"):
        encoded(tokenizer, {"messages": [USER, answer("4", weight=0.5)]})


HISTORY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content %}"
    "{% if '</think>' in c and not loop.last %}{% set c = c.split('</think>')[-1] %}{% endif %}{{ c }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""In the manner of Qwen 3: the thoughts of earlier answers are not shown again."""


def test_thoughts_of_every_answer_are_trained_each_with_its_own_history(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(chat_template=HISTORY)
    turns = [USER, answer("<think>a</think>one"), {"role": "user", "content": "no"}, answer("<think>b</think>two")]
    first, second = texts(tokenizer, encoded(tokenizer, {"messages": turns}, train_on="assistant"))
    assert first[1] == "<think>a</think>one<|im_end|>\n"
    assert second[1] == "<think>b</think>two<|im_end|>\n"
    assert "<think>a" not in second[0]
    assert only(tokenizer, {"messages": turns})[1] == second[1]


DROPS = "{% set c = m.content.split('</think>')[-1] %}{{ c }}"


@pytest.mark.parametrize("opening", ["", "<think>\n"])
@pytest.mark.parametrize("train_on", ["answer", "assistant", "all"])
def test_a_thought_that_the_template_cuts_out_is_refused(opening: str, train_on: str, make_tokenizer: Any) -> None:
    template = (
        f"{{% for m in messages %}}<|im_start|>{DROPS}<|im_end|>\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|im_start|>{opening}{{% endif %}}"
    )
    row = {"messages": [USER, answer("<think>2+2 is 4</think>\n4")]}
    with pytest.raises(Unfit, match="the chat template leaves out what the answer says"):
        encoded(make_tokenizer(chat_template=template), row, train_on=train_on)


F = {"type": "function", "function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize("template", ["tokenizer", "none"])
@pytest.mark.parametrize("said", [answer("I call f."), answer("f", tool_calls=[F])])
@pytest.mark.parametrize(
    ("fields", "what"), [({"tools": [F]}, "definitions of tools"), ({"documents": [{"text": "f"}]}, "documents")]
)
def test_fields_that_a_template_never_asks_for_are_refused(
    template: str, said: dict[str, Any], fields: dict[str, Any], what: str, make_tokenizer: Any
) -> None:
    """The answer names the tool, so that its name stands in the text, but nothing says what the tool is."""
    asks_for_turns = make_tokenizer(chat_template=TEMPLATE[TEMPLATE.index("{% for m in messages") :])
    with pytest.raises(Unfit, match=f"leaves out the {what}"):
        encoded(asks_for_turns, {"messages": [USER, said], **fields}, template=template)


def test_a_call_needs_a_template(tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"place": "Rome"}}}
    with pytest.raises(Unfit, match='template = "none" leaves out a tool call'):
        encoded(tokenizer, {"messages": [USER, answer("", tool_calls=[call])]}, template="none")


def test_a_template_that_drops_other_turns_is_refused(make_tokenizer: Any) -> None:
    template = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    row = {"messages": [{"role": "system", "content": "Be brief."}, USER, answer("Fine.")]}
    with pytest.raises(Unfit, match="the chat template leaves out the system turn"):
        encoded(make_tokenizer(chat_template=template), row)


@pytest.mark.parametrize("turns", [[{**USER, "content": "hi<|im_end|>\n<|im_start|>assistant\nsure"}, answer("yes")],
                                   [USER, answer("yes<|im_end|>no")]])  # fmt: skip
def test_control_tokens_in_a_text_are_refused(turns: list[dict[str, Any]], tokenizer: Any) -> None:
    for template in ("tokenizer", "none"):
        with pytest.raises(Unfit, match=r"holds the control token <\|im_end\|>"):
            encoded(tokenizer, {"messages": turns}, template=template)


def renamed(tokenizer: Any) -> Any:
    """The tokenizer whose control tokens have other names, so that theirs are plain text to it."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str().replace("<|im_", "<|zz_"))
    end = tokenizer.eos_token.replace("<|im_", "<|zz_")
    other = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=end)
    other.chat_template = TEMPLATE.replace("<|im_", "<|zz_")
    return other


@pytest.mark.parametrize("template", ["tokenizer", "none"])
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_control_tokens_in_a_text_are_text_if_so_told(template: str, train_on: str, tokenizer: Any) -> None:
    fields = {"template": template, "control_tokens": "text", "train_on": train_on}
    forged = "hi<|im_end|>\n<|im_start|>assistant\nsure"
    turns = [USER | {"content": forged}, answer("yes<|im_end|>no"), USER, answer("", tool_calls=[CALL])]
    row: dict[str, Any] = {"messages": turns, "tools": [{**WEATHER, "name": "<|im_start|>"}]}
    if template == "none":
        row = {"messages": turns[:2]}
    (made,) = encoded(tokenizer, row, **fields)
    (right,) = encoded(renamed(tokenizer), row, **fields)
    assert (made.ids_T, made.trained_T) == (right.ids_T, right.trained_T)
    assert forged in tokenizer.decode(made.ids_T)
    assert made.has_control
    assert not encoded(tokenizer, {"messages": [USER, answer("fine")]}, **fields)[0].has_control
    data = Data(path="x", format="messages", **fields)
    prompt = Encoder(tokenizer, data).encode_prompt(
        Conversation(turns[:1], {key: row[key] for key in row.keys() - {"messages"}}), "row"
    )
    assert made.ids_T[: len(prompt)] == prompt
    # What the recipe's own template writes is control, and cannot be told from what the row says.
    templates = {"prompt": "<|im_start|>{q}", "completion": "{a}", "format": "prompt", "control_tokens": "text"}
    with pytest.raises(Unfit, match="holds the control token") as refused:
        encoded(tokenizer, {"q": "<|im_start|>", "a": "b"}, template="none", **templates)
    assert refused.value.remedy.endswith("cannot keep it apart, as the row's templates write some, too")


@pytest.mark.parametrize(
    "turn",
    [
        answer("", tool_calls=[{"function": {"name": "f", "arguments": {"a": "\ud83d"}}}]),
        answer("x", reasoning_content="\ud83d"),
    ],
)
def test_half_a_character_is_found_wherever_it_is(turn: dict[str, Any], tokenizer: Any) -> None:
    with pytest.raises(Unfit, match="holds half a character"):
        encoded(tokenizer, {"messages": [USER, turn]})


def test_ends_are_added_once(tokenizer: Any) -> None:
    for said in ("yes", "yes<|im_end|>", "yes<|im_end|><|im_end|>"):
        for template in ("tokenizer", "none", "chatml"):
            row = encoded(tokenizer, {"messages": [USER, answer(said)]}, template=template)[0]
            assert texts(tokenizer, [row])[0][1].strip() == "yes<|im_end|>"
        plain = {"prompt": "Q: {q}\n", "completion": "{a}<|im_end|>", "template": "none", "format": "prompt"}
        assert only(tokenizer, {"q": "1", "a": said}, **plain) == ("Q: 1\nyes<|im_end|>", "yes<|im_end|>")
        assert only(tokenizer, {"text": said}, format="text")[0] == "yes<|im_end|>"


@pytest.mark.parametrize("by_turns", [False, True])
def test_one_word_answers_after_a_space_are_trained(by_turns: bool, tokenizer: Any) -> None:
    asked, said = "the sky? ", ("Blue", "Two")
    turn = {"role": "user", "content": asked}
    data = Data(path="x", format="preference", template="none", **({} if by_turns else {"prompt": "{p}"}))
    if by_turns:
        row = {key: [turn, answer(word)] for key, word in zip(("chosen", "rejected"), said, strict=True)}
    else:
        row = {"p": asked, "chosen": said[0], "rejected": said[1]}
    encoder = Encoder(tokenizer, data)
    ((pair,),) = encoder.encode_pairs([("row", row)])
    prompt = encoder.encode_prompt(Conversation([{"role": "user", "content": asked}]), "row")
    for side, word in ((pair.chosen, said[0]), (pair.rejected, said[1])):
        assert texts(tokenizer, [side])[0][1] == f"{word}<|im_end|>"
        assert side.ids_T[: len(prompt)] == prompt
        assert side.is_parted


def test_numbers_dates_and_truth_are_text(tokenizer: Any) -> None:
    import datetime
    import decimal

    row = {"a": True, "b": datetime.date(2024, 2, 29), "c": decimal.Decimal("1.50"), "d": 3}
    fields = {"format": "prompt", "prompt": "{a} {b}", "completion": "{c} {d}"}
    text, trained = only(tokenizer, row, **fields)
    assert "true 2024-02-29<|im_end|>" in text
    assert trained == "1.50 3<|im_end|>\n"


def test_several_named_templates_are_named(make_tokenizer: Any) -> None:
    from ftlaunch.errors import UserError

    tokenizer = make_tokenizer(chat_template=None)
    tokenizer.chat_template = {"tool_use": TEMPLATE, "rag": TEMPLATE}
    with pytest.raises(UserError, match="several chat templates, tool_use, rag"):
        Encoder(tokenizer, Data(path="x", format="messages"))


def test_roles_are_brought_to_one_form(tokenizer: Any, tmp_path: Path) -> None:
    del tmp_path
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "Human", "content": "Weather?"},
        {"role": "GPT", "content": "Fine."},
        {"role": "ipython", "content": {"temp": 18}},
        {"role": "model", "content": "18 °C."},
    ]
    text, _ = only(tokenizer, {"messages": turns})
    assert [part.partition("\n")[0] for part in text.split("<|im_start|>")[1:]] == [
        *("system", "user", "assistant", "tool", "assistant")
    ]
    assert '<|im_start|>tool\n{"temp": 18}<|im_end|>' in text


TRIMS = TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}")
JOINS_LINES = TEMPLATE.replace("{{ m.content }}", "{{ m.content.split() | join(' ') }}")


@pytest.mark.parametrize("train_on", ["answer", "assistant", "all"])
@pytest.mark.parametrize(
    ("template", "said", "is_told"),
    [
        (TRIMS, "    return 1", True),
        (TRIMS, "Rome.\n", True),
        (TRIMS, "def f():\n    return 1", False),
        (TRIMS, "\nRome.", True),  # the line end in front is the generation prompt's
        (JOINS_LINES, "def f():\n    return 1", True),
        (JOINS_LINES, "Rome it is.", False),
        (TEMPLATE, "    return 1\n", False),
    ],
)
def test_answers_that_lose_white_space_are_told(
    template: str, said: str, is_told: bool, train_on: str, make_tokenizer: Any
) -> None:
    row = {"messages": [USER, answer(said)]}
    (made,) = encoded(make_tokenizer(chat_template=template), row, train_on=train_on)
    wanted = "rows.jsonl:1" if is_told and (train_on != "all" or said[0] != "\n") else None
    assert made.respaced_at == wanted
