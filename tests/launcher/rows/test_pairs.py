"""Rows of preference data → pairs of conversations, in every shape that published data sets have."""

import json
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.recipe import Data
from ftlaunch.rows import check_rows
from ftlaunch.rows.pairs import Pair, pair_of
from ftlaunch.rows.template import DataError

USER = {"role": "user", "content": "2+2?"}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
EXPECTED = Pair([USER, GOOD], [USER, BAD], 1.0)
RATED = {"instruction": "2+2?", "completions": [{"response": text, "overall_score": score} for text, score in (
    ("5", 1.5), ("four", 7), ("4", "8.0"), ("6", 1.5)
)]}  # fmt: skip


def data(**fields: Any) -> Data:
    return Data(**{"path": "rows.jsonl", "format": "preference", **fields})


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, {}),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, {}),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, {}),
        ({"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, {}),
        ({"q": "2+2", "a": {"good": 4, "bad": 5}}, {"prompt": "{q}?", "chosen": "{a[good]}", "rejected": "{a[bad]}"}),
        ({"q": "2+2?", "chosen": "4", "rejected": "5"}, {"prompt": "{q}"}),
        ({"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"}, {}),
        ({"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "chosen": " 4", "rejected": "5 "}, {}),
    ],
    ids=["text", "turns", "whole turns", "prompt said twice", "templates", "prompt template", "HH", "HH with prompt"],
)
def test_every_shape_says_the_same(row: dict[str, Any], fields: dict[str, Any]) -> None:
    pair = pair_of(data(**fields), row, "row")
    assert isinstance(pair, Pair)
    said = [[{**turn, "content": turn["content"].strip()} for turn in turns] for turns in (pair.chosen, pair.rejected)]
    assert (said, pair.margin) == ([EXPECTED.chosen, EXPECTED.rejected], 1.0)


def test_dialogues_of_several_turns_keep_their_prompt() -> None:
    talk = "\n\nHuman: Hi.\n\nAssistant: Hello!\nHow are you?\n\nHuman: 2+2?\n\nAssistant: "
    pair = pair_of(data(), {"chosen": talk + "4", "rejected": talk + "5"}, "row")
    assert isinstance(pair, Pair)
    assert [turn["role"] for turn in pair.chosen] == ["user", "assistant", "user", "assistant"]
    assert pair.chosen[1]["content"] == "Hello!\nHow are you?"
    assert (pair.chosen[-1], pair.rejected[-1]) == (GOOD, BAD)


def test_plain_texts_share_what_they_begin_with() -> None:
    row = {"chosen": "The sky is blue.", "rejected": "The sky is blurred."}
    pair = pair_of(data(template="none"), row, "row")
    assert isinstance(pair, Pair)
    assert [turn["content"] for turn in pair.chosen] == ["The sky is", " blue."]
    assert [turn["content"] for turn in pair.rejected] == ["The sky is", " blurred."]


def test_ratings_make_a_pair_of_the_best_and_the_worst() -> None:
    pair = pair_of(data(format="ratings", prompt="{instruction}"), RATED, "row")
    assert pair == Pair([USER, GOOD], [USER, BAD], 6.5)


def test_a_system_turn_and_a_margin_are_added() -> None:
    row = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "by": 2}
    pair = pair_of(data(system="Be right.", margin_field="by"), row, "row")
    assert isinstance(pair, Pair)
    assert pair.margin == 2.0
    assert pair.chosen[0] == pair.rejected[0] == {"role": "system", "content": "Be right."}


@pytest.mark.parametrize(
    ("row", "fields", "reason"),
    [
        ({"prompt": "p", "chosen": " ", "rejected": "5"}, {}, "empty"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [{"role": "assistant", "content": ""}]}, {}, "empty"),
        ({"q": "p", "a": "\n", "b": "5"}, {"prompt": "{q}", "chosen": "A: {a}", "rejected": "A: {b}"}, "empty"),
        ({"prompt": "p", "chosen": "4", "rejected": " 4\n"}, {}, "identical"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "3+3?"}, BAD]}, {}, "unmatched"),
        (
            {"instruction": "p", "completions": [{"response": "a", "overall_score": 3}] * 2},
            {"format": "ratings", "prompt": "{instruction}"},
            "tied",
        ),
    ],
)
def test_rows_that_make_no_pair_say_why(row: dict[str, Any], fields: dict[str, Any], reason: str) -> None:
    assert pair_of(data(**fields), row, "row") == reason


@pytest.mark.parametrize(
    ("row", "fields", "problem"),
    [
        ({"chosen": "4", "rejected": "5"}, {}, "the pair has no prompt"),
        ({"chosen": "4", "rejected": "5"}, {"template": "none"}, "no beginning in common"),
        ({"prompt": "p", "chosen": "4"}, {}, "field rejected is missing"),
        ({"prompt": "p", "chosen": None, "rejected": "5"}, {}, "field chosen is null"),
        ({"prompt": "p", "chosen": [], "rejected": "5"}, {}, "field chosen is an empty list"),
        ({"prompt": "p", "chosen": [USER], "rejected": [{**USER, "content": "?"}]}, {}, "last turn is user"),
        ({"prompt": "p", "chosen": "4", "rejected": "5", "by": "much"}, {"margin_field": "by"}, "'much', not a number"),
        ({"prompt": "p", "chosen": "4", "rejected": "5", "by": -1}, {"margin_field": "by"}, "by is below 0"),
        (
            {"instruction": "p", "completions": [{"response": "a", "overall_score": None}]},
            {"format": "ratings", "prompt": "{instruction}"},
            "completions[0][overall_score] is null, not a number",
        ),
    ],
)
def test_broken_rows_are_named(row: dict[str, Any], fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError) as caught:
        pair_of(data(**fields), row, "rows.jsonl:3")
    assert problem in caught.value.problem
    assert str(caught.value).startswith("rows.jsonl:3: ")


def test_the_row_check_speaks_of_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "a"}, {"prompt": "p", "chosen": "", "rejected": "a"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [(where, message, _)] = check_rows(data(path=str(path)))
    assert (where, message) == (str(path), "none of the 2 rows read makes a pair: 1 identical, 1 empty")
    path.write_text(path.read_text() + json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    assert check_rows(data(path=str(path))) == []
    path.write_text(path.read_text() + json.dumps({"prompt": "p", "chosen": "a"}) + "\n")
    [(where, message, _)] = check_rows(data(path=str(path)))
    assert (where, message) == (f"{path}:4", "field rejected is missing (in 1 of 4 rows read)")
