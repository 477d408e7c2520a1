"""Every file of tests/shapes, which has rows in the shape of a published data set: what is trained, read back, and
what is left out or refused.

`pytest -s` prints the trained tokens of each file's first rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.rows import check_rows, settled
from fttrain.data import chat
from fttrain.data.prompts import load_prompts
from fttrain.data.skeleton import Skeletons
from fttrain.data.sources import load_rows
from fttrain.data.templates import LLAMA2
from fttrain.data.tokens import BlockEncoder, Tokenized, tokenize

SHAPES = Path(__file__).parents[2] / "shapes"

TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML that knows tools and thoughts."""
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML that knows neither."""
NO_THOUGHT = PLAIN.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")


def about(thing: str, number: int) -> str:
    return f"{thing} are worth knowing: fact {number} says they vary with place and season. Ünïcödé 漢字 🙂."


RIVERS, BREAD, CHESS, TIDES = (about(*one) for one in (("Rivers", 0), ("Bread", 1), ("Chess", 2), ("Tides", 3)))
ASK = "What should I know about rivers, point 0?"
TLDR = f"SUBREDDIT: r/x\n\nTITLE: {ASK}\n\nPOST: {RIVERS}\n\nTL;DR:"
QUOTED = 'Antwort "0" – mit Zeilen\nUmbruch'
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'

ALPACA = {"prompt": "{instruction}", "completion": "{output}"}
QA = {"prompt": "{question}", "completion": "{answer}"}
RATINGS = {"format": "ratings", "prompt": "{instruction}"}
NECTAR = {
    **{"format": "ratings", "prompt": "{prompt}", "answers_field": "answers"},
    **{"answer_field": "answer", "rating_field": "rank", "best_rating": "lowest"},
}


@dataclass(frozen=True)
class Shape:
    """A file and what becomes of it."""

    fields: dict[str, Any]
    kept: int
    asked: str
    """The end of the first row's prompt, without the template's marks."""
    trained: list[str]
    """Trained text of the first row, or of both answers of the first pair."""
    left_out: dict[str, int] = field(default_factory=dict[str, int])
    rows: int = 24
    format: str | None = None
    """What the fields tell."""


def chats(trained: str, **more: Any) -> Shape:
    return Shape(**{"fields": {}, "kept": 24, "asked": ASK, "trained": [trained], "format": "messages", **more})


SFT: dict[str, Shape] = {
    "dolly.jsonl": Shape(
        {"prompt": "{instruction}{?\n\n{context}}", "completion": "{response}"},
        24,
        f"{ASK}\n\nPassage about rivers.",
        [RIVERS],
    ),
    "dolly_oai.parquet": chats(RIVERS, fields={"train_on": "assistant"}),
    "smoltalk.parquet": chats(f"{RIVERS}<|im_end|>\n{BREAD}", fields={"train_on": "assistant"}, asked="And more?"),
    "tulu3.parquet": chats(RIVERS, fields={"train_on": "assistant"}),
    "no_robots.parquet": chats(RIVERS, fields={"train_on": "assistant"}),
    "e2e_cleaned.csv": Shape(
        {"prompt": "{mr}", "completion": "{ref}"},
        24,
        "name[The Rivers], food[Thai], area[city centre]",
        ["The Rivers serves Thai food, version 0."],
    ),
    "e2e_nlg.parquet": Shape(
        {"prompt": "{meaning_representation}", "completion": "{human_reference}"},
        24,
        "name[The Rivers], food[Thai]",
        ["The Rivers serves Thai, 0."],
    ),
    "trivia_qa.parquet": Shape({"prompt": "{question}", "completion": "{answer[value]}"}, 24, ASK, ["York 0"]),
    "alpaca.parquet": Shape({}, 23, f"{ASK}\n\nrivers, lakes", [RIVERS], {"field output is empty": 1}, format="alpaca"),
    "alpaca_ok.parquet": Shape({}, 24, f"{ASK}\n\nrivers, lakes", [RIVERS], format="alpaca"),
    "alpaca_cleaned.json": Shape({}, 24, f"{ASK}\n\nrivers", [RIVERS], format="alpaca"),
    "openhermes25.json": chats(RIVERS, format="sharegpt"),
    "slimorca.jsonl": chats(RIVERS, format="sharegpt"),
    "chat_empty_system.jsonl": chats(RIVERS),
    "chat_empty_user.jsonl": chats(RIVERS, asked="more", kept=23, left_out={"field messages[][content] is empty": 1}),
    "ultrachat.parquet": chats(
        CHESS,
        asked="Go on.",
        kept=23,
        left_out={"the last turn is user, not assistant: there is no answer to train": 1},
    ),
    "sharegpt_humanlast.jsonl": chats(
        RIVERS,
        format="sharegpt",
        kept=23,
        left_out={"the last turn is user, not assistant: there is no answer to train": 1},
    ),
    "sharegpt_gptfirst.jsonl": chats(
        RIVERS, format="sharegpt", kept=23, left_out={"the first turn is assistant, not user": 1}
    ),
    "sharegpt_emptyconv.jsonl": chats(
        RIVERS, format="sharegpt", kept=23, left_out={"field conversations is an empty list": 1}
    ),
    "chat_developer.jsonl": chats(RIVERS),
    "chat_fromvalue_messages.jsonl": chats(RIVERS),
    "tldr.parquet": Shape({}, 24, TLDR, [f" {RIVERS}"], format="prompt"),
    "trl_promptcompletion_conv.jsonl": Shape({}, 24, ASK, [RIVERS], format="prompt"),
    "helpsteer2.jsonl": Shape({}, 24, ASK, [RIVERS], format="prompt"),
    "gsm8k.jsonl": Shape(QA, 24, ASK, ["2+2=<<2+2=4>>4\n#### 0,000"]),
    "metamath.json": Shape({"prompt": "{query}", "completion": "{response}"}, 24, ASK, [f"{RIVERS}\nThe answer is: 0"]),
    "xlam.jsonl": Shape(
        {"prompt": "{tools}\n{query}", "completion": "{answers}"},
        24,
        ASK,
        ['[{"name": "live_giveaways", "arguments": {"type": "beta"}}]'],
    ),
    "tools_openai.jsonl": chats(RIVERS, asked='{"temp": 21}'),
    "tools_dictargs.jsonl": chats(RIVERS, asked='{"temp": 21}'),
    "tools_endcall.jsonl": chats(CALL),
    "tools_thought.jsonl": chats(RIVERS, asked='{"temp": 21}'),
    "tools_nulls.parquet": chats(RIVERS),
    "openr1.parquet": chats("<think>\nWe know 0.\n</think>\n\nThe answer is \\boxed{0}."),
    "reasoning_field.jsonl": chats("<think>\nWe know 0.\n</think>\nIt is so."),
    "excel_comma_bom.csv": Shape(ALPACA, 24, "Was ist „rivers“; 0?", [QUOTED]),
    "excel_semicolon_bom.csv": Shape(ALPACA, 24, "Was ist „rivers“; 0?", [QUOTED]),
    "excel_utf16.csv": Shape(ALPACA, 24, "Was ist „rivers“; 0?", [QUOTED]),
    "table.tsv": Shape(ALPACA, 24, "Was ist „rivers“; 0?", [QUOTED]),
    "semi_plain.csv": Shape(ALPACA, 6, "Frage 0", ["Antwort 0"], rows=6),
    "semi_comma.csv": Shape(ALPACA, 6, "Frage 0, bitte", ["Antwort 0"], rows=6),
    **{
        name: Shape(ALPACA, 24, ASK, [RIVERS])
        for name in ("json_lines.json", "list_in.jsonl", "json_data_key.json", "json_columns.json", "nan.jsonl")
    },
    **{
        name: Shape({}, 24, ASK, [RIVERS], format="alpaca") for name in ("data.jsonl.gz", "data.json.gz", "data.ndjson")
    },
    **{
        name: Shape({}, rows, f"[train] {ASK}", [RIVERS], rows=rows, format="alpaca")
        for name, rows in (("hub_clone", 20), ("shards_flat", 20), ("saved_ds", 10), ("nested", 10))
    },
    "numbers.jsonl": Shape({"prompt": "{text}", "completion": "{label}"}, 24, ASK, ["0"]),
    "dup_prompts.jsonl": Shape(QA, 24, ASK, [RIVERS]),
    "one_bad.jsonl": Shape(ALPACA, 999, "q0", ["a0"], {"field output is null": 1}, rows=1000),
}

PAIRS: dict[str, Shape] = {
    "ultrafeedback.jsonl": Shape(
        RATINGS,
        21,
        ASK,
        [RIVERS, TIDES],
        {"an answer is empty": 1, "field completions is an empty list": 1, "its answers are all rated alike": 1},
        format="ratings",
    ),
    "ultrafeedback_ok.jsonl": Shape(
        RATINGS,
        22,
        ASK,
        [RIVERS, TIDES],
        {"an answer is empty": 1, "its answers are all rated alike": 1},
        format="ratings",
    ),
    "uf_binarized.parquet": Shape(
        {},
        22,
        ASK,
        [RIVERS, BREAD],
        {"an answer is empty": 1, "its two answers are the same": 1},
        format="preference",
    ),
    "dpo_mix.parquet": Shape({}, 24, "more", [BREAD, "No 0."], format="preference"),
    "tldr_pref.parquet": Shape({}, 24, TLDR, [f" {RIVERS}", " nothing 0"], format="preference"),
    "hh.jsonl": Shape(
        {},
        22,
        ASK,
        [RIVERS, "I do not know 0."],
        {"an answer is empty": 1, "the last turn is user, not assistant: there is no answer to train": 1},
        format="preference",
    ),
    "hh_ok.jsonl": Shape(
        {}, 22, ASK, [RIVERS, "I do not know 0."], {"an answer is empty": 1}, rows=23, format="preference"
    ),
    "orca_dpo.jsonl": Shape(
        {"system": "{system?}", "prompt": "{question}"}, 24, ASK, [RIVERS, "Hm 0."], format="preference"
    ),
    "helpsteer2_pref.jsonl": Shape(
        {
            **{"prompt": "{prompt}", "chosen": "{response_2}", "rejected": "{response_1}"},
            "preference_field": "preference_strength",
        },
        21,
        ASK,
        [RIVERS, BREAD],
        {"field preference_strength is 0: no answer is the better one": 3},
    ),
    "nectar.jsonl": Shape(NECTAR, 24, ASK, [RIVERS, about("Snow", 6)], format="ratings"),
}

PROMPTS = {"trl_promptonly_conv.jsonl": "prompt", "rl_messages.jsonl": "messages", "rl_text.jsonl": "prompt"}

TEXTS: dict[str, tuple[dict[str, Any], str, int, dict[str, int]]] = {
    "guanaco_llama2.parquet": ({}, f"<s>[INST] {ASK} [/INST] {RIVERS} </s>", 24, {}),
    "text_eos.jsonl": ({}, "<s>[INST] q0 [/INST] answer 0 </s>", 6, {}),
    "oa_guanaco.jsonl": ({}, f"<s>### Human: {ASK}### Assistant: {RIVERS}</s>", 24, {}),
    "english_quotes.jsonl": ({"text_field": "quote"}, f"<s>“{RIVERS}”</s>", 24, {}),
    "wikitext.parquet": ({}, "<s> = Rivers = \n</s>", 48, {"field text is blank": 48}),
    "corpus.txt": ({}, f"<s>{RIVERS}</s>", 200, {}),
}

ELSEWHERE = {"kto.jsonl", "oasst1.parquet", "longdocs.jsonl", "longchat.jsonl", "lfs_pointer.jsonl"} | {
    *("excel_cp1252.csv", "excel_latin1_iconv.csv", "utf16_iconv.jsonl")
}
"""Files that tests of their own read."""


@pytest.fixture(scope="session")
def chat_tokenizer(make_tokenizer: Callable[..., Any]) -> Callable[[str], Any]:
    return lambda template: make_tokenizer(chat_template=template)


def table(name: str, **fields: Any) -> Data:
    return Data(**{"path": str(SHAPES / name), "max_length": 4096, **fields})


def read(name: str, tokenizer: Any, cache: Path, **fields: Any) -> Tokenized:
    """The file as tokens, once the launcher has looked at it and has found nothing wrong."""
    data = settled(table(name, **fields))
    found = check_rows(data)
    assert found.problems == []
    made = tokenize(data, tokenizer, 1, cache)
    assert any("left out" in note for note in found.notes) == bool(made.counts.unfit or made.counts.excused)
    return made


def trained(made: Tokenized, tokenizer: Any, row: int = 0) -> list[tuple[str, str]]:
    """(text that is not trained, text that is) of each row of a group."""
    texts = [
        (tokenizer.decode(ids[~marks].tolist()), tokenizer.decode(ids[marks].tolist()))
        for ids, marks in made.train.group(row).rows
    ]
    print(*texts, sep="\n")
    return texts


def test_every_file_is_tried() -> None:
    tried = {*SFT, *PAIRS, *PROMPTS, *TEXTS, *ELSEWHERE}
    assert {path.name for path in SHAPES.iterdir()} == tried


@pytest.mark.parametrize("name", [*SFT, *PAIRS])
def test_rows_and_pairs(name: str, chat_tokenizer: Callable[[str], Any], tmp_path: Path) -> None:
    shape, tokenizer = {**SFT, **PAIRS}[name], chat_tokenizer(TOOLS)
    assert settled(table(name, **shape.fields)).format == shape.format
    made = read(name, tokenizer, tmp_path, **shape.fields)
    assert (made.counts.rows, made.counts.kept) == (shape.rows, shape.kept)
    assert {**made.counts.unfit, **made.counts.excused} == shape.left_out
    assert made.counts.truncated == made.counts.lost == 0
    found = trained(made, tokenizer)
    assert [text for _, text in found] == [f"{text}<|im_end|>\n" for text in shape.trained]
    for prompt, _ in found:
        assert f"{shape.asked}<|im_end|>\n<|im_start|>assistant\n" in prompt
        assert prompt.endswith("<|im_start|>assistant\n")


def test_no_blank_lines_where_the_context_is_empty(chat_tokenizer: Callable[[str], Any], tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(TOOLS)
    made = read("dolly.jsonl", tokenizer, tmp_path, **SFT["dolly.jsonl"].fields)
    asked = "What should I know about bread, point 1?"
    assert trained(made, tokenizer, row=1)[0][0] == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["openhermes25.json", "chat_empty_system.jsonl", "orca_dpo.jsonl"])
def test_an_empty_system_turn_is_none(name: str, chat_tokenizer: Callable[[str], Any], tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(TOOLS)
    made = read(name, tokenizer, tmp_path, **{**SFT, **PAIRS}[name].fields)
    prompts = [prompt for row in range(len(made.train)) for prompt, _ in trained(made, tokenizer, row)]
    assert not any("system\n<|im_end|>" in prompt for prompt in prompts)
    assert any(prompt.startswith("<|im_start|>user") for prompt in prompts)


@pytest.mark.slow
def test_the_fast_way_is_the_slow_way(chat_tokenizer: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Skeletons and borders that tokens are asked for, against every row rendered and every token looked at."""
    every = {name: {**shape.fields, "train_on": "assistant"} for name, shape in {**SFT, **PAIRS}.items()}
    every |= {name: {**fields, "format": "text"} for name, (fields, *_) in TEXTS.items()}
    tables = [settled(table(name, **fields)) for name, fields in every.items()]
    rows = [list(load_rows(data)) for data in tables]
    tokenizers = [chat_tokenizer(template) for template in (TOOLS, LLAMA2)]

    def encoded() -> list[Any]:
        made = [
            BlockEncoder(tokenizer, data)(found)
            for data, found in zip(tables, rows, strict=True)
            for tokenizer in tokenizers
        ]
        return [(block, tally.as_plain()) for block, tally in made]

    fast = encoded()
    monkeypatch.setattr(Skeletons, "filled", lambda *_: None)
    monkeypatch.setattr(chat, "_places", lambda *_: None)
    assert fast == encoded()


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str, chat_tokenizer: Callable[[str], Any]) -> None:
    tokenizer, data = chat_tokenizer(TOOLS), settled(table(name))
    assert data.format == PROMPTS[name]
    assert check_rows(data, only_prompts=True).problems == []
    prompts = load_prompts(data, tokenizer, 1)
    assert (prompts.counts.rows, len(prompts.train)) == (24, 24)
    text = tokenizer.decode(prompts.train[0].ids_T.tolist())
    assert text.endswith(f"<|im_start|>user\n{ASK}<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name: str, make_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    fields, text, kept, left_out = TEXTS[name]
    tokenizer = make_tokenizer(adds_bos=True, eos_token="</s>")
    made = read(name, tokenizer, tmp_path, format="text", **fields)
    assert (made.counts.kept, made.counts.excused, made.counts.unfit) == (kept, left_out, {})
    assert trained(made, tokenizer) == [("", text)]
    ids = made.train.group(0).rows[0][0].tolist()
    assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (1, 1)


def test_long_documents_are_split(make_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    whole = read("longdocs.jsonl", tokenizer, tmp_path, format="text", max_length=100_000)
    made = read("longdocs.jsonl", tokenizer, tmp_path, format="text", max_length=128)
    assert (made.counts.split, made.counts.lost, made.counts.truncated) == (6, 0, 0)
    assert made.train.lengths.max() <= 128
    assert made.counts.tokens == whole.counts.tokens


def test_what_long_answers_lose_is_counted(chat_tokenizer: Callable[[str], Any], tmp_path: Path) -> None:
    whole = read("longchat.jsonl", chat_tokenizer(TOOLS), tmp_path, max_length=100_000)
    cut = read("longchat.jsonl", chat_tokenizer(TOOLS), tmp_path, max_length=128)
    assert cut.counts.truncated == 24
    assert cut.counts.lost == int((whole.train.lengths - 128).clip(min=0).sum())
    assert cut.counts.kept + cut.counts.dropped_untrained == 24


REFUSED: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "oasst1.parquet": ({}, "", "single messages of a tree", "each path from a root to a leaf"),
    "lfs_pointer.jsonl": ({}, "", "Git LFS pointer", "git lfs pull"),
    "excel_cp1252.csv": (ALPACA, ":2", "not UTF-8", "iconv -f cp1252"),
    "excel_latin1_iconv.csv": (ALPACA, ":2", "control characters", "iconv -f cp1252"),
    "utf16_iconv.jsonl": (ALPACA, ":1", "UTF-16 that was converted as if it were Latin-1", "iconv -f utf-16"),
    "trivia_qa.parquet": ({"prompt": "{question}", "completion": "{answer}"}, "", "is an object", "{answer[KEY]}"),
    "nan.jsonl": ({"prompt": "{instruction}", "completion": "{score}"}, ":1", "score is nan", "leave such rows out"),
    "gsm8k.jsonl": ({"prompt": "{questoin?}", "completion": "{answer}"}, "", "no row has the field questoin", "answer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_the_launcher(name: str) -> None:
    fields, place, problem, remedy = REFUSED[name]
    try:
        found = check_rows(settled(table(name, **fields))).problems[0]
    except UserError as error:
        found = (str(error.message), str(error.message), error.remedy)
    assert f"{name}{place}" in found[0]
    assert problem in found[1]
    assert remedy in found[2]


@pytest.mark.parametrize(
    ("name", "template", "dropped"),
    [
        *(
            (name, PLAIN, "the definitions of tools")
            for name in SFT
            if name.startswith("tools_") and "nulls" not in name
        ),
        ("reasoning_field.jsonl", PLAIN, "the thought before the answer"),
        ("openr1.parquet", NO_THOUGHT, "what the answer says"),
    ],
)
def test_a_template_that_leaves_something_out_is_refused(
    name: str, template: str, dropped: str, chat_tokenizer: Callable[[str], Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"the chat template leaves out {dropped}"):
        read(name, chat_tokenizer(template), tmp_path)


@pytest.mark.parametrize("name", [name for name in SFT if name.startswith("tools_")])
def test_tools_stand_in_the_prompt_and_calls_in_the_answers(
    name: str, chat_tokenizer: Callable[[str], Any], tmp_path: Path
) -> None:
    tokenizer = chat_tokenizer(TOOLS)
    made = read(name, tokenizer, tmp_path, train_on="assistant")
    texts = [trained(made, tokenizer, row)[0] for row in range(len(made.train))]
    assert not any("null" in prompt + answer or '\\"city' in prompt + answer for prompt, answer in texts)
    called = [(prompt, answer) for prompt, answer in texts if "<tool_call>" in answer]
    assert called
    assert all(CALL in answer for _, answer in called)
    if "nulls" not in name:
        assert all('"name": "get_weather", "description"' in prompt for prompt, _ in texts)


def test_unpaired_labels_are_known() -> None:
    data = settled(table("kto.jsonl"))
    assert data.format == "unpaired"
    assert check_rows(data).problems == []
