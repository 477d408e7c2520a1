"""Which tokens are trained, checked by reading them back: never by the spans that chose them."""

from pathlib import Path
from typing import Any

import pytest
from tests.trainer.in_process import encode_row

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.rows.messages import Conversation
from ftlaunch.rows.template import DataError, Excused
from fttrain.data.chat import Encoded, Encoder
from fttrain.data.templates import chat_template
from fttrain.data.tokens import supervised

CHAT = [
    {"role": "user", "content": "What colour is the sky?"},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "And the capital of France? 🗼"},
    {"role": "assistant", "content": "Paris, bien sûr. 😀"},
]
SHAREGPT = [{"from": "human" if turn["role"] == "user" else "gpt", "value": turn["content"]} for turn in CHAT]
PAIR = {"question": "What colour is the sky?", "answer": {"value": "Blue."}}
ASKED = {"prompt": "Q: {question}", "completion": "{answer[value]}"}
ALPACA = {"instruction": "Name the colour.", "input": "the sky", "output": "Blue."}

FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "prompt": (ASKED, PAIR, ["Blue."]),
    "alpaca": ({"format": "alpaca"}, ALPACA, ["Blue."]),
    "messages": ({"format": "messages"}, {"messages": CHAT}, ["Blue.", "Paris, bien sûr. 😀"]),
    "turns under a template of one field": (
        {"prompt": "{input}", "completion": "{output}"},
        {"input": CHAT[:-1], "output": "Paris, bien sûr. 😀"},
        ["Blue.", "Paris, bien sûr. 😀"],
    ),
    "sharegpt": ({"format": "sharegpt"}, {"conversations": SHAREGPT}, ["Blue.", "Paris, bien sûr. 😀"]),
    "messages with a system turn": (
        {"format": "messages", "messages_field": "chat"},
        {"chat": [{"role": "system", "content": "Be brief."}, *CHAT]},
        ["Blue.", "Paris, bien sûr. 😀"],
    ),
    "sharegpt with the recipe's system turn": (
        {"format": "sharegpt", "system": "Be {mood}."},
        {"conversations": SHAREGPT, "mood": "brief"},
        ["Blue.", "Paris, bien sûr. 😀"],
    ),
}
WRITTEN = {
    "tokenizer": "{}<|im_end|>\n",
    "chatml": "{}<|im_end|>\n",
    "llama2": " {} <|im_end|>",
    "none": "{}<|im_end|>",
}
"""What each template writes for an assistant turn; the tokenizer's EOS is <|im_end|>."""


def make_data(**fields: Any) -> Data:
    return Data(**{"path": "rows.jsonl", **fields})


def encode(tokenizer: Any, row: dict[str, Any], **fields: Any) -> Encoded:
    (encoded,) = encode_row(Encoder(tokenizer, make_data(**fields)), row)
    return encoded


def runs(encoded: Encoded, tokenizer: Any) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    found: list[list[int]] = []
    before = False
    for token, trained in zip(encoded.ids_T, encoded.trained_T, strict=True):
        if trained:
            found = found if before else [*found, []]
            found[-1].append(token)
        before = trained
    return [tokenizer.decode(ids) for ids in found]


@pytest.mark.parametrize("template", WRITTEN)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_trains_its_answers_and_their_ends(name: str, template: str, tokenizer: Any) -> None:
    fields, row, answers = FORMATS[name]
    expected = [WRITTEN[template].format(answer) for answer in answers]
    answer = encode(tokenizer, row, template=template, **fields)
    assistant = encode(tokenizer, row, template=template, train_on="assistant", **fields)
    everything = encode(tokenizer, row, template=template, train_on="all", **fields)
    assert runs(answer, tokenizer) == expected[-1:]
    assert runs(assistant, tokenizer) == expected
    assert runs(everything, tokenizer) == [tokenizer.decode(everything.ids_T)]
    assert answer.ids_T == assistant.ids_T == everything.ids_T


@pytest.mark.parametrize("template", WRITTEN)
def test_eos_is_trained_though_padding_uses_it_too(template: str, tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    encoded = encode(tokenizer, PAIR, template=template, **ASKED)
    trained = [token for token, is_trained in zip(encoded.ids_T, encoded.trained_T, strict=True) if is_trained]
    assert tokenizer.eos_token_id in trained
    assert Encoder(tokenizer, make_data(template=template, **ASKED)).is_ended(encoded)


def test_text_is_trained_whole_between_bos_and_eos(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(adds_bos=True, eos_token="</s>")
    encoded = encode(tokenizer, {"story": "Blue is the sky."}, format="text", text_field="story")
    assert tokenizer.decode(encoded.ids_T) == "<s>Blue is the sky.</s>"
    assert all(encoded.trained_T)
    assert supervised(encoded) == len(encoded.ids_T) - 1


def test_llama2_text_is_metas(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(chat_template=None, adds_bos=True, eos_token="</s>")
    chat = [{"role": "system", "content": "Be brief."}, *CHAT[:2], {"role": "user", "content": " And you? "}, CHAT[1]]
    encoded = encode(tokenizer, {"messages": chat}, format="messages", template="llama2", train_on="assistant")
    assert tokenizer.decode(encoded.ids_T) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat colour is the sky? [/INST] Blue. </s>"
        "<s>[INST] And you? [/INST] Blue. </s>"
    )
    assert runs(encoded, tokenizer) == [" Blue. </s>", " Blue. </s>"]


def test_chatml_text(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(chat_template=None)
    encoded = encode(tokenizer, PAIR, template="chatml", **ASKED)
    text = "<|im_start|>user\nQ: What colour is the sky?<|im_end|>\n<|im_start|>assistant\nBlue.<|im_end|>\n"
    assert tokenizer.decode(encoded.ids_T) == text


def test_chatml_ends_turns_with_eos_where_im_end_is_no_token() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", len(vocab))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    encoded = encode(tokenizer, PAIR, template="chatml", **ASKED)
    assert tokenizer.decode(encoded.ids_T).startswith("<s><|im_start|>user\nQ:")
    assert runs(encoded, tokenizer) == ["Blue.</s>\n"]


def test_alpaca_has_headings_where_no_template_marks_the_turns(tokenizer: Any) -> None:
    plain = encode(tokenizer, ALPACA, format="alpaca", template="none")
    headed = "### Instruction:\nName the colour.\n\n### Input:\nthe sky\n\n### Response:\nBlue.<|im_end|>"
    assert tokenizer.decode(plain.ids_T) == headed
    bare = encode(tokenizer, {"instruction": "Name it.", "input": "", "output": "Blue."}, format="alpaca")
    assert "user\nName it.<|im_end|>" in tokenizer.decode(bare.ids_T)


def test_the_templates_own_system_turn_stays(tokenizer: Any) -> None:
    encoded = encode(tokenizer, PAIR, **ASKED)
    assert tokenizer.decode(encoded.ids_T).startswith(
        "<|im_start|>system\nBe a tiny model.<|im_end|>\n<|im_start|>user"
    )


def test_a_rows_own_system_turn_stays(tokenizer: Any) -> None:
    chat = [{"role": "system", "content": "Be brief."}, *CHAT]
    row = {"messages": chat}
    bare = encode(tokenizer, row, format="messages")
    assert encode(tokenizer, row, format="messages", system="Be long.") == bare
    assert tokenizer.decode(bare.ids_T).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")


def write_template(path: Path, *, between: str) -> str:
    path.write_text(
        "{% for m in messages %}{{ m['role'] + ':' + BETWEEN + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' + BETWEEN }}{% endif %}".replace("BETWEEN", repr(between))
    )
    return str(path)


def test_a_jinja_file_is_a_template(tokenizer: Any, tmp_path: Path) -> None:
    path = write_template(tmp_path / "chat.jinja", between="\n")
    encoded = encode(tokenizer, {"messages": CHAT}, format="messages", template=path, train_on="assistant")
    assert runs(encoded, tokenizer) == ["Blue.<|im_end|>", "Paris, bien sûr. 😀<|im_end|>"]


def test_a_token_across_the_border_is_parted_there(tokenizer: Any, tmp_path: Path) -> None:
    path = write_template(tmp_path / "chat.jinja", between=" ")
    encoded = encode(tokenizer, PAIR, template=path, **ASKED)
    assert runs(encoded, tokenizer) == ["Blue.<|im_end|>"]
    assert encoded.is_parted
    encoder = Encoder(tokenizer, make_data(template=path, **ASKED))
    asked = encoder.encode_prompt(Conversation([{"role": "user", "content": "Q: What colour is the sky?"}]), "row")
    assert encoded.ids_T[: len(asked)] == asked


def test_line_ends_that_an_answer_begins_with_are_parted_from_the_prompt_s(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw: Any = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        ["assistant:\n\n\nBlue"] * 9, trainers.BpeTrainer(special_tokens=["<|im_end|>"], initial_alphabet=alphabet)
    )
    joined: Any = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>")
    path = write_template(tmp_path / "chat.jinja", between="\n")
    encoded = encode(joined, {"prompt": "x", "completion": "\n\nBlue"}, template=path, format="prompt")
    assert runs(encoded, joined) == ["\n\nBlue<|im_end|>"]
    assert encoded.is_parted


def test_a_long_row_is_cut_or_left_out(tokenizer: Any) -> None:
    whole = encode(tokenizer, PAIR, **ASKED)
    length = len(whole.ids_T)
    assert not whole.truncated
    assert encode(tokenizer, PAIR, max_length=length, **ASKED) == whole
    cut = encode(tokenizer, PAIR, max_length=length - 3, **ASKED)
    assert (cut.ids_T, cut.trained_T, cut.truncated) == (whole.ids_T[:-3], whole.trained_T[:-3], True)
    with pytest.raises(Excused, match="longer than max_length"):
        encode(tokenizer, PAIR, max_length=length - 1, overlong="drop", **ASKED)


def test_many_rows_are_encoded_as_one_by_one(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, make_data(format="messages", max_length=60, train_on="assistant"))
    rows = [(f"rows.jsonl:{n}", {"messages": CHAT[: 2 + 2 * (n % 2)]}) for n in range(6)]
    assert encoder.encode_many(rows) == [encode_row(encoder, row, where) for where, row in rows]
    assert encoder.encode_many([]) == []


@pytest.mark.parametrize(
    ("train_on", "turns", "renders"), [("answer", 2, 2), ("assistant", 2, 2), ("assistant", 4, 4), ("all", 4, 1)]
)
def test_no_text_is_rendered_twice(train_on: str, turns: int, renders: int, make_tokenizer: Any) -> None:
    tokenizer, calls = make_tokenizer(), []
    render = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *args, **kwargs: (calls.append(1), render(*args, **kwargs))[1]
    encode(tokenizer, {"messages": CHAT[:turns]}, format="messages", train_on=train_on)
    assert len(calls) == renders


def refusal(tokenizer: Any, row: dict[str, Any], **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        encode(tokenizer, row, **fields)
    return str(caught.value)


def test_two_bos_are_refused(make_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(adds_bos=True, eos_token="</s>")
    (tmp_path / "twice.jinja").write_text(
        "{{ bos_token + bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    said = refusal(tokenizer, PAIR, template=str(tmp_path / "twice.jinja"), **ASKED)
    assert "rows.jsonl:1: the row begins with <s> twice" in said


REWRITES = {
    "the prompt": (
        "{% for m in messages %}{{ '(gone)' if m['role'] == 'assistant' and not loop.last else m['role'] + ':'"
        " + m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    ),
    "the answer": (
        "{% for m in messages %}{{ m['role'] + ':' + m['content']"
        " + ('(last)' if loop.last and m['role'] == 'assistant' else '') + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    ),
}


def test_where_earlier_turns_are_rewritten_each_answer_is_trained_as_the_newest(make_tokenizer: Any) -> None:
    for rewritten, ending in (("the prompt", ""), ("the answer", "(last)")):
        tokenizer = make_tokenizer(chat_template=REWRITES[rewritten])
        data = make_data(format="messages", train_on="assistant")
        first, second = encode_row(Encoder(tokenizer, data), {"messages": CHAT})
        assert runs(first, tokenizer) == [f"Blue.{ending}<|im_end|>"]
        assert runs(second, tokenizer) == [f"Paris, bien sûr. 😀{ending}<|im_end|>"]
        assert tokenizer.decode(first.ids_T).startswith("user:What colour is the sky?")


def test_the_last_answer_may_do_where_earlier_ones_are_rewritten(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(chat_template=REWRITES["the prompt"])
    encoded = encode(tokenizer, {"messages": CHAT}, format="messages")
    assert runs(encoded, tokenizer) == ["Paris, bien sûr. 😀<|im_end|>"]


def test_what_a_template_refuses_names_the_row(tokenizer: Any) -> None:
    chat = [CHAT[0], {"role": "tool", "content": "sky: blue"}, CHAT[1]]
    said = refusal(tokenizer, {"messages": chat}, format="messages", template="llama2")
    assert "rows.jsonl:1: the chat template refuses the conversation: user and assistant turns must alternate" in said


@pytest.mark.parametrize(
    ("special", "fields", "said"),
    [
        ({"chat_template": None}, {}, 'template = "chatml"'),
        ({"eos_token": None, "pad_token": None}, {"template": "none"}, "no end token"),
        ({"eos_token": None, "pad_token": None}, {"template": "llama2"}, "no end token"),
        ({}, {"template": "no/such.jinja"}, "the chat template no/such.jinja cannot be read"),
        ({}, {"template": "none", "prompt": "Q: {question} A: "}, "ends with a space"),
    ],
)
def test_a_tokenizer_that_lacks_what_the_data_needs(
    special: dict[str, Any], fields: dict[str, Any], said: str, make_tokenizer: Any
) -> None:
    with pytest.raises(UserError) as caught:
        chat_template(make_tokenizer(**special), make_data(**{**ASKED, **fields}))
    assert said in str(caught.value)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match=r"tokenizer\.json|slow"):
        Encoder(Slow(), make_data(**ASKED))


def test_a_row_without_the_field_is_named(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: field answer\[value\] is missing"):
        encode(tokenizer, {"question": "Why?", "answer": {}}, **ASKED)
