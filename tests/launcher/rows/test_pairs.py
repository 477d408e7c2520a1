"""Rows of preference data → pairs of conversations, in every shape that published data sets have."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from ftlaunch.recipe.data import Data
from ftlaunch.rows import check_rows, settled
from ftlaunch.rows.groups import grouped
from ftlaunch.rows.messages import Conversation
from ftlaunch.rows.pairs import Pair, pair_of
from ftlaunch.rows.readers import read_rows
from ftlaunch.rows.template import DataError, Excused, Unfit

USER = {"role": "user", "content": "2+2?"}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}


def pair(margin: float = 1.0) -> Pair:
    return Pair(Conversation([USER, GOOD]), Conversation([USER, BAD]), margin)


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
        ({"q": [USER], "chosen": "4", "rejected": "5"}, {"prompt": "{q}"}),
        ({"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"}, {}),
        ({"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "chosen": " 4", "rejected": "5 "}, {}),
    ],
    ids=[
        "text",
        "turns",
        "whole turns",
        "prompt said twice",
        "templates",
        "prompt template",
        "turns as prompt template",
        "HH",
        "HH with prompt",
    ],
)
def test_every_shape_says_the_same(row: dict[str, Any], fields: dict[str, Any]) -> None:
    found = pair_of(data(**fields), row, "row")
    said = [
        [{**turn, "content": turn["content"].strip()} for turn in side.turns] for side in (found.chosen, found.rejected)
    ]
    assert (said, found.margin) == ([[USER, GOOD], [USER, BAD]], 1.0)


def test_dialogues_of_several_turns_keep_their_prompt() -> None:
    talk = "\n\nHuman: Hi.\n\nAssistant: Hello!\nHow are you?\n\nHuman: 2+2?\n\nAssistant: "
    found = pair_of(data(), {"chosen": talk + "4", "rejected": talk + "5"}, "row")
    chosen, rejected = found.chosen.turns, found.rejected.turns
    assert [turn["role"] for turn in chosen] == ["user", "assistant", "user", "assistant"]
    assert chosen[1]["content"] == "Hello!\nHow are you?"
    assert (chosen[-1], rejected[-1]) == (GOOD, BAD)


def test_plain_texts_share_what_they_begin_with() -> None:
    row = {"chosen": "The sky is blue.", "rejected": "The sky is blurred."}
    found = pair_of(data(template="none"), row, "row")
    assert [turn["content"] for turn in found.chosen.turns] == ["The sky is", " blue."]
    assert [turn["content"] for turn in found.rejected.turns] == ["The sky is", " blurred."]


def test_ratings_make_a_pair_of_the_best_and_the_worst() -> None:
    assert pair_of(data(format="ratings", prompt="{instruction}"), RATED, "row") == pair(6.5)


def test_of_ranks_the_lowest_is_the_best() -> None:
    answers = [{"answer": text, "rank": rank} for text, rank in (("four", 2), ("4", 1.0), ("5", 3))]
    fields = {"answers_field": "answers", "answer_field": "answer", "rating_field": "rank", "best_rating": "lowest"}
    row = {"prompt": "\n\nHuman: 2+2?\n\nAssistant: ", "answers": answers}
    assert pair_of(data(format="ratings", prompt="{prompt}", **fields), row, "row") == pair(2.0)


@pytest.mark.parametrize(("number", "sides"), [(3, ("4", "5")), ("-2", ("5", "4"))])
def test_a_negative_preference_swaps(number: float | str, sides: tuple[str, str]) -> None:
    row = {"prompt": "2+2?", "a": sides[0], "b": sides[1], "strength": number}
    fields = {"chosen": "{a}", "rejected": "{b}", "preference_field": "strength"}
    assert pair_of(data(**fields), row, "row") == pair(abs(float(number)))
    with pytest.raises(Excused, match="no answer is the better one"):
        pair_of(data(**fields), {**row, "strength": 0}, "row")


def test_a_system_turn_and_a_margin_are_added() -> None:
    row = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "by": 2}
    found = pair_of(data(system="Be right.", margin_field="by"), row, "row")
    assert found.margin == 2.0
    assert found.chosen.turns[0] == found.rejected.turns[0] == {"role": "system", "content": "Be right."}


def test_answers_that_are_calls_are_answers() -> None:
    sides = [
        [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"x": x}}]}]
        for x in (2, 3)
    ]
    row = {"chosen": sides[0], "rejected": sides[1], "tools": [{"name": "add"}]}
    found = pair_of(data(), row, "row")
    assert found.chosen.fields["tools"] == [{"name": "add"}]
    calls = [side.turns[-1]["tool_calls"][0]["function"]["arguments"] for side in (found.chosen, found.rejected)]
    assert calls == [{"x": 2}, {"x": 3}]


@pytest.mark.parametrize(
    ("row", "fields", "reason"),
    [
        ({"prompt": "p", "chosen": " ", "rejected": "5"}, {}, "an answer is empty"),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [{"role": "assistant", "content": ""}]},
            {},
            "an answer is empty",
        ),
        (
            {"q": "p", "a": "\n", "b": "5"},
            {"prompt": "{q}", "chosen": "A: {a}", "rejected": "A: {b}"},
            "an answer is empty",
        ),
        ({"prompt": "p", "chosen": "4", "rejected": " 4\n"}, {}, "its two answers are the same"),
        (
            {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "3+3?"}, BAD]},
            {},
            "its two answers have different prompts",
        ),
        (
            {"instruction": "p", "completions": [{"response": "a", "overall_score": 3}] * 2},
            {"format": "ratings", "prompt": "{instruction}"},
            "its answers are all rated alike",
        ),
    ],
)
def test_rows_that_make_no_pair_say_why(row: dict[str, Any], fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unfit) as caught:
        pair_of(data(**fields), row, "row")
    assert caught.value.reason == reason
    assert caught.value.is_excused == (reason not in ("an answer is empty", "its two answers have different prompts"))


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
    [(where, message, _)] = check_rows(data(path=str(path), unfit_share=0.9)).problems
    reasons = "1 × an answer is empty, 1 × its two answers are the same"
    assert (where, message) == (str(path), f"none of the 2 rows read can be trained on: {reasons}")
    path.write_text(path.read_text() + json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    found = check_rows(data(path=str(path), unfit_share=0.5))
    assert (found.problems, len(found.notes)) == ([], 1)
    path.write_text(path.read_text() + json.dumps({"prompt": "p", "chosen": "a"}) + "\n")
    (empty, missing) = check_rows(data(path=str(path))).problems
    assert empty[:2] == (f"{path}:2", "an answer is empty (in 1 of 4 rows read)")
    assert missing[:2] == (f"{path}:4", "field rejected is missing (in 1 of 4 rows read)")
    assert "unfit_share" in missing[2]


def test_rows_with_one_answer_each_are_grouped_by_their_prompt(tmp_path: Path) -> None:
    rated = [("a", "worst", 0), ("a", "best", 3), ("a", "fair", 2), ("b", "x", 1), ("b", "y", 1), ("c", "alone", 4)]
    rows = [{"prompt": prompt, "response": text, "helpfulness": number, "id": 1} for prompt, text, number in rated]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"format": "ratings", "prompt": "{prompt}", "rating_field": "helpfulness", "group_by": "prompt"}
    table = Data(path=str(tmp_path / "a.jsonl"), **fields)
    found = check_rows(table)
    assert found.problems == []
    left_out, unread = found.notes
    assert left_out.startswith("2 of 3 rows left out: 2 × its answers are all rated alike")
    assert unread == "unread columns: id"
    (where, first), *_ = list(grouped(table, read_rows(tmp_path / "a.jsonl")))
    assert where.endswith("a.jsonl:1")
    pair = pair_of(table, first, where)
    assert [side.turns[-1]["content"] for side in (pair.chosen, pair.rejected)] == ["best", "worst"]
    assert pair.margin == 3
    (tmp_path / "a.jsonl").write_text('{"question": "a", "response": "b", "helpfulness": 1}\n')
    ((_, message, remedy),) = check_rows(table).problems
    assert message == "field prompt, by which rows are grouped, is missing"
    assert remedy == "the row has the fields question, response, helpfulness: use one of these"


def test_answers_that_stand_apart_from_those_to_the_same_prompt_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "response": f"r{n}", "score": n} for n, prompt in enumerate("aabbaccdd")]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = Data(path=str(path), format="ratings", prompt="{prompt}", rating_field="score", group_by="prompt")
    ((where, message, remedy),) = check_rows(table).problems
    assert where == f"{path}:5"
    assert message == "other rows with the same prompt stand further up, not next to it (in 1 of 5 rows read)"
    # The remedy works.
    command = remedy[remedy.index("python") : remedy.rindex('"') + 1]
    new = tmp_path / "new.jsonl"
    told = shlex.split(command.replace("FILE", str(path)).replace("NEW", str(new)))
    subprocess.run([sys.executable, *told[1:]], check=True)
    assert check_rows(replace(table, path=str(new))).problems == []
    assert sum(1 for _ in grouped(table, read_rows(new))) == 4


def test_preferences_without_a_sign_are_refused(tmp_path: Path) -> None:
    rows = [{"p": "q", "a": "x", "b": "y", "labels": number % 2} for number in range(6)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = Data(path=str(path), prompt="{p}", chosen="{a}", rejected="{b}", preference_field="labels")
    ((_, message, _),) = check_rows(table).problems
    assert message == "field labels is 0 or 1 in all rows, and 0 would mean that no answer is better"
    path.write_text("".join(json.dumps({**row, "labels": row["labels"] or -1}) + "\n" for row in rows))
    assert check_rows(table).problems == []


@pytest.mark.parametrize(
    ("name", "said", "good", "bad"),
    [
        ("messages", {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, "b"),
        (
            "conversations",
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
            {"from": "gpt", "value": "b"},
        ),
    ],
)
def test_turns_in_a_field_of_their_own_are_the_prompt(
    name: str, said: Any, good: Any, bad: Any, tmp_path: Path
) -> None:
    row = {name: [said], "chosen": good, "rejected": bad}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    table = settled(Data(path=str(path)))
    found = check_rows(table)
    assert (found.problems, found.notes) == ([], [])
    pair = pair_of(table, row, "pairs.jsonl:1")
    assert [[turn["content"] for turn in side.turns] for side in (pair.chosen, pair.rejected)] == [
        ["q", "a"],
        ["q", "b"],
    ]
    answered = {**row, name: [said, good]}
    with pytest.raises(Unfit, match="the pair has no prompt"):
        pair_of(table, answered, "pairs.jsonl:1")
