"""Fields tell a format, and rows that lack something are left out by reason."""

import json
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.rows import check_rows, settled
from ftlaunch.rows.conversations import conversation_of
from ftlaunch.rows.prompts import prompt_of
from ftlaunch.rows.readers import read_rows
from ftlaunch.rows.template import DataError, Unfit, fill, optional_fields, template_fields

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ASKED = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("rows", "keys"),
    [
        ([{**ASKED, "label": 1}, {**ASKED, "label": 0}], 'format = "prompt"'),
        ([{**ASKED, "label": None}, {**ASKED, "label": "False"}], 'format = "prompt"'),
        ([{**ASKED, "label": 1}, {**ASKED, "label": -1}], 'format = "prompt"'),
        ([{**ASKED, "label": "Bad"}, {**ASKED, "label": "good"}], 'format = "prompt"'),
        ([{"messages": TURNS, "label": True}], 'format = "messages"'),
        ([{"messages": TURNS, "system": "s", "label": True}], 'format = "messages", system = "{system?}"'),
        ([{"instruction": "a", "output": "b", "kto_tag": False}], 'format = "alpaca"'),
        (
            [{"question": "a", "answer": "b", "correct": 0.0}],
            'format = "prompt", prompt = "{question}", completion = "{answer}"',
        ),
    ],
)
def test_answers_that_may_be_bad_are_refused(rows: list[dict[str, Any]], keys: str, tmp_path: Path) -> None:
    data = Data(path=written(tmp_path / "a.jsonl", rows))
    with pytest.raises(DataError, match="it may say which answers are bad") as error:
        settled(data)
    assert error.value.remedy.endswith(f"write {keys}")
    remedied = replace(data, **tomllib.loads(keys.replace(", ", "\n")))
    assert settled(remedied) == remedied
    assert check_rows(remedied).problems == []
    assert settled(data, only_prompts=True).format


MORE = [ASKED, ASKED]


@pytest.mark.parametrize(
    ("rows", "said", "keys"),
    [
        ([ASKED, {**ASKED, "weight": 0.5}], "the field weight weighs rows", ""),
        ([{**ASKED, "weight": "1"}, {**ASKED, "weight": 2}], "the field weight weighs rows", ""),
        ([{"messages": TURNS, "images": ["a.png"]}], "the field images holds what is no text", ""),
        ([{"text": "a"}, {"text": "a", "Image": {"path": "a.png"}}], "the field Image holds", ""),
        ([{**ASKED, "chosen": "b", "rejected": "c", "image": "a.png"}], "the field image", ""),
        ([*MORE, {**ASKED, "system": "s"}], "the field system holds a system turn", 'system = "{system?}"'),
        (
            [{"question": "a", "answer": "b"}] * 2 + [{"question": "a", "answer": "b", "context": "c"}],
            "the field context is not read",
            'prompt = "{question}{?\\n\\n{context}}", completion = "{answer}"',
        ),
        (
            [{"inputs": "a", "targets": "b", "definition": "c"}],
            "the field definition is not read, and may be part of the prompt",
            'prompt = "{?{definition}\\n\\n}{inputs}", completion = "{targets}"',
        ),
        (
            [{"Question": "a", "Complex_CoT": "c", "Response": "b"}],
            "the field Complex_CoT is not read, and may be the thought",
            'prompt = "{Question}", completion = "{?<think>\\n{Complex_CoT}\\n</think>\\n\\n}{Response}"',
        ),
        (
            [{"text": "a", "answer": "b"}],
            "the field answer is not read, and may be the answer",
            'prompt = "{text}", completion = "{answer}"',
        ),
        ([{"query": "a", "response": "b", "history": [["c", "d"]]}], "the field history holds earlier turns", ""),
    ],
)
def test_fields_without_which_rows_say_something_else_are_refused(
    rows: list[dict[str, Any]], said: str, keys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftlaunch.rows.looks.LOOKED_AT", 2)  # the other rows are met while all are read
    data = Data(path=written(tmp_path / "a.jsonl", rows))
    ((where, message, remedy),) = check_rows(settled(data)).problems
    assert (where, message.startswith(said)) == (f"{data.path}:{len(rows)}", True)
    for way in (*filter(None, [keys]), 'unread = "ignore"'):
        assert way in remedy
        told = settled(replace(data, **tomllib.loads(way.replace('", c', '"\nc'))))
        assert check_rows(told).problems == []
    written_out = replace(settled(data), unread=None)  # whoever writes the format knows the rows
    assert check_rows(written_out).problems == []
    alike = [{**ASKED, "images": [], "weight": 2}, {**ASKED, "weight": "2.0"}]
    assert check_rows(settled(Data(path=written(tmp_path / "b.jsonl", alike)))).problems == []


@pytest.mark.parametrize("name", ["train", "Training"])
def test_a_column_that_tells_splits_apart_is_refused(name: str, tmp_path: Path) -> None:
    rows = [{**ASKED, "split": name}, {**ASKED, "prompt": "[test]", "split": "test"}, {**ASKED, "split": "other"}]
    path = tmp_path / "a.jsonl"
    ((_, message, remedy),) = check_rows(Data(path=written(path, rows), format="prompt")).problems
    assert message == f"the column split says {name!r} of some rows and 'test' of others, and all would be trained on"
    _, command = remedy.split(": ", 1)
    new = tmp_path / "b.jsonl"
    shell = command.split("; ")[0].replace("FILE", str(path)).replace("NEW", str(new))
    subprocess.run(shell, shell=True, check=True)
    assert [json.loads(line) for line in new.read_text().splitlines()] == rows[:1]
    assert check_rows(Data(path=str(new), format="prompt")).problems == []


def test_class_numbers_are_no_truth(tmp_path: Path) -> None:
    rows = [{**ASKED, "label": number % 3} for number in range(6)]
    assert settled(Data(path=written(tmp_path / "a.jsonl", rows))).format == "prompt"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "a", "completion": "b"}, {"format": "prompt"}),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, {"format": "prompt"}),
        ({"prompt": "a", "completion": "b", "label": True}, {"format": "unpaired"}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"format": "preference"}),
        ({"prompt": "a", "messages": TURNS}, {"format": "messages"}),
        ({"messages": json.dumps(TURNS)}, {"format": "messages"}),
        ({"conversations": [{"from": "human", "value": "a"}]}, {"format": "sharegpt"}),
        ({"system": "s", "conversations": TURNS}, {"format": "messages", "system": "{system?}"}),
        ({"instruction": "a", "input": "", "output": "b"}, {"format": "alpaca"}),
        (
            {"instruction": "a", "context": "", "response": "b"},
            {"format": "prompt", "prompt": "{instruction}{?\n\n{context}}", "completion": "{response}"},
        ),
        ({"input": "a", "output": "b"}, {"format": "prompt", "prompt": "{input}", "completion": "{output}"}),
        ({"Question": "a", "Answer": "b"}, {"format": "prompt", "prompt": "{Question}", "completion": "{Answer}"}),
        (
            {"Question": "no", "question": "a", "answer": "b"},
            {"format": "prompt", "prompt": "{question}", "completion": "{answer}"},
        ),
        (
            {"system_prompt": "s", "question": "a", "response": "b"},
            {"format": "prompt", "prompt": "{question}", "completion": "{response}", "system": "{system_prompt?}"},
        ),
        ({"question": "a", "chosen": "b", "rejected": "c"}, {"format": "preference", "prompt": "{question}"}),
        ({"question": "a", "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"}, {"format": "preference"}),
        ({"question": "a", "chosen": TURNS, "rejected": TURNS}, {"format": "preference"}),
        ({"prompt": "a", "id": 1}, {"format": "prompt"}),
        ({"text": "a", "label": 1}, {"format": "text"}),
    ],
)
def test_fields_tell_the_format(row: dict[str, Any], told: dict[str, str], tmp_path: Path) -> None:
    data = settled(Data(path=written(tmp_path / "a.jsonl", [row])))
    assert {
        key: getattr(data, key) for key in ("format", "prompt", "completion", "system") if getattr(data, key)
    } == told


@pytest.mark.parametrize(
    ("row", "fields", "unread"),
    [
        ({"text": "a", "label": 1}, {}, "label"),
        ({"prompt": "a", "completion": "b", "tools": [], "id": 1}, {}, "id"),
        ({"instruction": "a", "output": "b", "input": "", "history": [], "text": "t"}, {}, "text"),
        ({"conversation": TURNS, "messages_": 1, "turn": 2}, {}, "messages_, turn"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1, "id": 1}, {"margin_field": "margin"}, "id"),
        ({"q": "a", "a": {"value": "b"}, "c": 1}, {"prompt": "{q}", "completion": "{a[value]}"}, "c"),
        ({"prompt": "a", "completion": "b", "label": True}, {"format": "unpaired"}, None),
        (
            {f"c{index:02}": 1 for index in range(15)} | {"text": "a"},
            {},
            ", ".join(f"c{i:02}" for i in range(12)) + " and 3 more",
        ),
    ],
)
def test_columns_that_nothing_reads_are_told(
    row: dict[str, Any], fields: dict[str, str], unread: str | None, tmp_path: Path
) -> None:
    data = settled(Data(path=written(tmp_path / "a.jsonl", [row]), **fields))
    assert check_rows(data).notes == ([] if unread is None else [f"unread columns: {unread}"])
    # A reward function is given all of a row.
    if data.format not in ("text", "unpaired"):
        assert check_rows(data, only_prompts=True).notes == []


def test_what_is_written_counts(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"question": "q", "chosen": "b", "rejected": "c", "text": "t"}])
    for fields in ({"format": "text"}, {"prompt": "{question}", "completion": "{chosen}"}):
        assert settled(Data(path=path, **fields)) == Data(path=path, **fields)
    assert settled(Data(path=path, prompt="{question}")).format == "preference"
    with pytest.raises(DataError, match="do not tell their format: a, b"):
        settled(Data(path=written(tmp_path / "b.jsonl", [{"a": 1, "b": 2}])))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{a}{b?}", "x"),
        ("{a}{?\n\nContext: {b}}", "x"),
        ("{a}{? ({c[d]})}!", "x (y)!"),
        ("{a}{? {c[d]}, {b}}", "x"),
        ("{{{a}}}{?{{{c[d]}}}}", "{x}{y}"),
    ],
)
def test_optional_parts(template: str, text: str) -> None:
    for blank in ({}, {"b": None}, {"b": " "}, {"b": float("nan")}, {"b": []}):
        assert fill(template, {"a": "x", "c": {"d": "y"}, **blank}, "row") == text


def test_fields_of_optional_parts() -> None:
    assert template_fields("{a}{b?}{?x {c[d]}}") == [("a",), ("b",), ("c", "d")]
    assert optional_fields("{a}{b?}{?x {c[d]}}") == {"b", "c"}
    for broken in ("{?x}", "{?{a}", "{a?}}", "{?{?{a}}}"):
        with pytest.raises(UserError):
            template_fields(broken)


def test_a_blank_field_is_told_how_to_be_optional() -> None:
    with pytest.raises(Unfit) as caught:
        fill("{a}", {"a": ""}, "row")
    assert "{a?}" in caught.value.remedy


def test_characters_of_no_width_are_nothing() -> None:
    with pytest.raises(Unfit, match="field a is empty"):
        fill("{a}", {"a": " \u200b\ufeff \u200d"}, "row")
    assert fill("{a?}{?: {a}}", {"a": "\u200b"}, "row") == ""
    assert fill("{a}", {"a": "\u200bשלום"}, "row") == "\u200bשלום"


def test_history_comes_first() -> None:
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    turns = conversation_of(Data(path="x", format="alpaca"), row, "row").turns
    assert [turn["content"] for turn in turns] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"instruction": "a", "output": "b", "history": 1}, "field history is a number, not a list"),
        ({"messages": TURNS, "tools": [None]}, "field tools holds null among its definitions"),
        ({"messages": TURNS, "tools": '["f"]'}, "field tools holds text among its definitions"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400}, "field margin is too large a number"),
    ],
)
def test_values_of_other_types_are_unfit(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    margin = {"margin_field": "margin"} if "margin" in row else {}
    data = settled(Data(path=written(tmp_path / "a.jsonl", [row]), **margin))
    ((_, message, _),) = check_rows(data).problems
    assert message == f"{problem} (in 1 of 1 rows read)"


def test_unfit_rows_are_named_up_to_a_share(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "a"}] * 20 + [{"question": "q"}, {"question": "q", "answer": None}]
    path = written(tmp_path / "a.jsonl", rows)
    found = check_rows(Data(path=path, prompt="{question}", completion="{answer}"))
    assert found.problems == []
    assert found.notes == [
        f"2 of 22 rows left out: 1 × field answer is missing, 1 × field answer is null; "
        f"first {path}:21: field answer is missing; {path}:22: field answer is null"
    ]
    for fields in ({"unfit_share": 0.05}, {"unfit": "stop"}):
        found = check_rows(Data(path=path, prompt="{question}", completion="{answer}", **fields))
        assert [where for where, _, _ in found.problems] == [f"{path}:21", f"{path}:22"]
        assert all("unfit" in remedy for _, _, remedy in found.problems)


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"question": "q", "A": "x", "B": "y", "answer": "A"}, 'prompt = "{question}\\nA: {A}\\nB: {B}"'),
        ({"question": "q", "option_1": "x", "option_2": "y", "answer": "x"}, "option_1: {option_1}"),
        ({"instruction": "q", "completions": [{"response": "a", "overall_score": 1}]}, 'format = "ratings"'),
        ({"id": 1, "messages": str(TURNS)}, "json.dumps"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "name the texts"),
    ],
)
def test_fields_that_tell_no_format_have_a_remedy_of_their_own(
    row: dict[str, Any], remedy: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        settled(Data(path=written(tmp_path / "a.jsonl", [row])))
    assert remedy in caught.value.remedy


USER, ANSWER = TURNS
OF_OTHERS = [
    {
        "systemInstruction": {"parts": [{"text": "s"}]},
        "contents": [{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": [{"text": "b"}]}],
    },
    {
        "input": {"messages": [USER], "tools": []},
        "preferred_output": [ANSWER],
        "non_preferred_output": [{**ANSWER, "content": "c"}],
    },
    {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [{**ANSWER, "content": "c"}]},
    {"conversations": ["a", "b"]},
    {"messages": [["user", "a"], ["assistant", "b"]]},
    {"messages": [{"author": "user", "content": "a"}, {"author": "bot", "content": "b"}]},
    {"conversation": [{"input": "a", "output": "b"}]},
    {"messages": [{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}]},
    {"query": "a", "response": "b", "history": [["c", "d"]]},
]


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq, which the remedies name, is not installed")
@pytest.mark.parametrize("row", OF_OTHERS)
def test_the_commands_for_files_of_other_services_work(row: dict[str, Any], tmp_path: Path) -> None:
    data = Data(path=written(tmp_path / "a.jsonl", [row]))
    try:
        ((_, _, remedy),) = check_rows(settled(data)).problems
    except DataError as error:
        remedy = error.remedy
    command = remedy.split("`")[1].replace("FILE", "a.jsonl").replace("NEW", "b.jsonl")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    data = settled(Data(path=str(tmp_path / "b.jsonl")))
    assert data.format in ("messages", "preference", "alpaca")
    assert check_rows(data).problems == []
    said = [[turn["content"] for turn in prompt_of(data, row, "row").turns] for _, row in read_rows(Path(data.path))]
    assert said == [["s", "a"] if "contents" in row else ["c", "d", "a"] if "history" in row else ["a"]]


@pytest.mark.parametrize(("line", "kind"), [(json.dumps(ASKED), "JSON"), ("prompt\tcompletion", "cells between tabs")])
def test_lines_of_json_in_a_txt_are_refused_unless_they_are_meant(line: str, kind: str, tmp_path: Path) -> None:
    data = Data(path=str(tmp_path / "rows.jsonl.txt"))
    (tmp_path / "rows.jsonl.txt").write_text(f"{line}\n{line}\n")
    with pytest.raises(DataError, match=f"its lines are {kind}") as caught:
        settled(data)
    assert 'format = "text"' in caught.value.remedy
    meant = replace(data, format="text")
    assert settled(meant) == meant
    (tmp_path / "rows.jsonl.txt").write_text("A text.\n")
    assert settled(data).format == "text"
