"""Reading local rows: what is read, and the place and remedy of what is not."""

import bz2
import json
import lzma
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.names import is_local
from ftlaunch.rows import Findings, check_rows, settled
from ftlaunch.rows.conversations import conversation_of
from ftlaunch.rows.files import data_files
from ftlaunch.rows.readers import read_rows
from ftlaunch.rows.template import DataError, fill, template_fields

ROW = {"question": "Why?", "answer": "Because."}
LINE = json.dumps(ROW) + "\n"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", LINE * 2, ["1", "2"]),
        ("a.jsonl", f"\ufeff{LINE}\n{LINE.strip()}", ["1", "3"]),
        ("a.jsonl", LINE.replace("\n", "\r\n") * 2, ["1", "2"]),
        ("a.json", json.dumps([ROW, ROW]), ["1 (row 1)", "1 (row 2)"]),
        ("a.json", f"\ufeff[\n {LINE},\n\n{LINE}\n]\n", ["2 (row 1)", "5 (row 2)"]),
        ("a.csv", "question,answer\nWhy?,Because.\nWhy?,Because.\n", ["2", "3"]),
        ("a.csv", '\ufeffquestion , answer\r\n"Why?",Because.\r\n\r\nWhy?,Because.', ["2", "4"]),
    ],
)
def test_rows_come_with_their_places(name: str, content: str, places: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    assert list(read_rows(path)) == [(f"{path}:{place}", ROW) for place in places]


def test_a_csv_row_over_several_lines_is_placed_at_its_first(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'a,b\n"one\ntwo, ""2""",x\ny,z\n')
    rows = [(f"{path}:2", {"a": 'one\ntwo, "2"', "b": "x"}), (f"{path}:4", {"a": "y", "b": "z"})]
    assert list(read_rows(path)) == rows


BROKEN = {
    "empty.jsonl": ("", "", "the file has no rows"),
    "blank.jsonl": ("\n\n", "", "the file has no rows"),
    "empty.json": ("", "", "the file has no rows"),
    "empty-list.json": ("[ ]", "", "the file has no rows"),
    "empty.csv": ("", "", "the file has no rows"),
    "header-only.csv": ("a,b\n", "", "the file has no rows"),
    "latin1.jsonl": (LINE.encode() + '{"a": "é"}\n'.encode("latin1"), ":2", "not UTF-8 (byte 0xe9)"),
    "latin1.json": (b'[\n{"a": "\xe9"}]', ":2", "not UTF-8 (byte 0xe9)"),
    "latin1.csv": (b"a,b\nx,y\nx,\xe9\n", ":3", "not UTF-8 (byte 0xe9)"),
    "cut.jsonl": (LINE + '{"a": "b', ":2", "not JSON: Unterminated string"),
    "two.jsonl": (LINE.strip() + LINE, ":1", "not JSON: Extra data"),
    "list.jsonl": (LINE + "[1]\n", ":2", "the row is a list, not an object"),
    "null.jsonl": ("null\n", ":1", "the row is null, not an object"),
    "deep.jsonl": ("[" * 100_000 + "\n", ":1", "a value nests too deeply"),
    "long.jsonl": (LINE + '{"a": "' + "x" * 10 * 2**20 + '"}\n', ":2", "the line is longer than 8 MiB"),
    "long.csv": ("a,b\n" + "x" * 10 * 2**20 + ",y\n", ":2", "the line is longer than 8 MiB"),
    "cut.json": ("[\n{}", ":2", "not a JSON list: expected ',', found 'the end'"),
    "no-comma.json": ("[{}\n{}]", ":2", "not a JSON list: expected ',', found '{'"),
    "comma.json": ("[{},]", "", "not a JSON list"),
    "trailing.json": ("[{}]\nx", ":2", "something stands after the list"),
    "text.json": ('[{},\n"x"]', ":2", "the row is text, not an object"),
    "ragged.csv": ("a,b\n1,2\n1,2,3\n", ":3", "3 cells under 2 columns"),
    "short.csv": ("a,b\n1\n", ":2", "1 cells under 2 columns"),
    "twice.csv": ("a,b,a\n1,2,3\n", ":1", "column 'a' is named twice"),
    "nameless.csv": ("a,,b\n1,2,3\n", ":1", "a column has no name"),
    "open-quote.csv": ('a,b\n1,2\n"1,2\n3,4\n', ":3", "not CSV"),
    "kind.doc": ("x", "", "files of kind '.doc' are not read"),
    "pointer.jsonl": ("version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "", "is a Git LFS pointer"),
    "twice.jsonl": (LINE.encode("utf-16").decode("latin-1"), ":1", "UTF-16 that was converted as if it were Latin-1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(name: str, tmp_path: Path) -> None:
    content, place, problem = BROKEN[name]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert caught.value.where.startswith(f"{path}{place}")
    assert problem in caught.value.problem
    assert caught.value.remedy


TWICE = '{"question": "Why?", "answer": "no", "answer": "yes"}'


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", LINE * 9 + f"{TWICE}\n" + LINE, ":10"),
        ("a.json", f"[{', '.join([LINE] * 9)}, {TWICE}]", ":10 (row 10)"),
        ("a.jsonl", LINE * 9 + f'{{"question": "Why?", "answer": "x", "more": [{TWICE}]}}\n', ":10"),
    ],
)
def test_a_row_with_a_key_twice_is_unfit(name: str, content: str, where: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    found = check_rows(Data(path=str(path), prompt="{question}", completion="{answer}"))
    assert found.problems == []
    assert "left out: 1 × the key 'answer' is there twice" in found.notes[0]
    assert f"{path}{where}:" in found.notes[0]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        list(read_rows(tmp_path / "no.jsonl"))
    with pytest.raises(DataError, match="no such file or folder"):
        data_files(tmp_path / "no.jsonl")


def test_the_files_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data files"):
        data_files(tmp_path)
    for name in ("b.jsonl", "a.parquet", "c.csv", "readme.md", ".hidden.json"):
        write(tmp_path / name, LINE)
    assert [path.name for path in data_files(tmp_path)] == ["a.parquet", "b.jsonl", "c.csv"]
    assert data_files(tmp_path / "c.csv") == [tmp_path / "c.csv"]
    with pytest.raises(DataError, match=r"files of kind '\.md'"):
        data_files(tmp_path / "readme.md")


def test_an_id_of_the_hub_stays_one_beside_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mandarjoshi/trivia_qa").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_local("mandarjoshi/trivia_qa")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{a}", "x"),
        ("Q: {a}\nA: {b[c]}", "Q: x\nA: y"),
        ("{d[1]}{d[0][e]}", "32.5"),
        ('{{"a": "{a}"}}', '{"a": "x"}'),
        ("no field", "no field"),
    ],
)
def test_fill(template: str, text: str) -> None:
    row = {"a": "x", "b": {"c": "y"}, "d": [{"e": 2.5}, 3]}
    assert fill(template, row, "a.jsonl:1") == text


@pytest.mark.parametrize(
    ("template", "problem", "remedy"),
    [
        ("{x}", "field x is missing", "the row has the fields a, b, c, d, e, f, g: use one of these"),
        ("{b[x]}", "field b[x] is missing", "b has the fields c"),
        ("{b[c][x]}", "field b[c][x] is missing", "b[c] has no fields in it: it is text"),
        ("{d[7]}", "field d[7] is missing", "d has 1 items, counted from 0"),
        ("{b}", "field b is an object, not text or a number", "{b[KEY]}"),
        ("{d}", "field d is a list, not text or a number", "{d[KEY]}"),
        ("{a}", "field a is null", "leave such rows out"),
        ("{e}", "field e is empty", "leave such rows out"),
        ("{f}", "field f is nan", "leave such rows out"),
        ("{g}", "field g holds half a character", "UTF-8"),
    ],
)
def test_fill_names_what_is_wrong(template: str, problem: str, remedy: str) -> None:
    row = {"a": None, "b": {"c": "y"}, "c": 1, "d": [3], "e": " \n", "f": float("nan"), "g": "\ud800"}
    with pytest.raises(DataError) as caught:
        fill(template, row, "a.jsonl:3")
    assert (caught.value.where, caught.value.problem) == ("a.jsonl:3", problem)
    assert remedy in caught.value.remedy


def check(path: Path, rows: list[Any], **fields: Any) -> list[tuple[str, str, str]]:
    """Findings, with the line in place of the path and without the remedy's text."""
    write(path, "".join(json.dumps(row) + "\n" for row in rows))
    found = check_rows(Data(path=str(path), **fields)).problems
    return [(where.rpartition(":")[2], message, "remedy" if remedy else "") for where, message, remedy in found]


ASKED: dict[str, Any] = {"prompt": "{question}", "completion": "{answer}"}


def test_sound_rows_have_no_findings(tmp_path: Path) -> None:
    assert check(tmp_path / "a.jsonl", [ROW, ROW], **ASKED) == []
    assert check_rows(Data(path="owner/name", **ASKED)) == Findings()


def test_each_kind_of_problem_is_shown_once_and_counted(tmp_path: Path) -> None:
    rows = [ROW, {"question": "Why?"}, {**ROW, "answer": None}, {"question": "When?"}, {**ROW, "answer": " "}]
    assert check(tmp_path / "a.jsonl", rows, **ASKED) == [
        ("2", "field answer is missing (in 2 of 5 rows read)", "remedy"),
        ("3", "field answer is null (in 1 of 5 rows read)", "remedy"),
        ("5", "field answer is empty (in 1 of 5 rows read)", "remedy"),
    ]


def test_what_cannot_be_read_is_a_finding_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"question": "Why?"}\nno\n')
    (missing, broken) = check_rows(Data(path=str(path), **ASKED)).problems
    assert missing[:2] == (f"{path}:1", "field answer is missing (in 1 of 1 rows read)")
    assert broken[:2] == (f"{path}:2", "not JSON: Expecting value")
    assert check_rows(Data(path=str(tmp_path / "no.csv"), **ASKED)).problems[0][1] == "no such file or folder"


def test_only_what_is_used_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [ROW, ROW, {"question": "Why?"}]
    assert check(tmp_path / "a.jsonl", rows, limit=2, **ASKED) == []
    monkeypatch.setattr("ftlaunch.rows.CHECKED_ROWS", 2)
    assert check(tmp_path / "a.jsonl", rows, **ASKED) == []
    note = "the first 2 rows were looked at; a run looks at all of them"
    assert check_rows(Data(path=str(tmp_path / "a.jsonl"), **ASKED)).notes == [note]
    monkeypatch.setattr("ftlaunch.rows.CHECKED_ROWS", 3)
    assert len(check(tmp_path / "a.jsonl", rows, **ASKED)) == 1
    monkeypatch.setattr("ftlaunch.rows.CHECKED_BYTES", 60)
    assert check(tmp_path / "a.jsonl", rows, **ASKED) == []


def turn(role: str, content: Any = "Hm.") -> dict[str, Any]:
    return {"role": role, "content": content}


def said(speaker: str, value: Any = "Hm.") -> dict[str, Any]:
    return {"from": speaker, "value": value}


@pytest.mark.parametrize(
    ("fields", "row", "message"),
    [
        ({"format": "text"}, {"text": "x"}, None),
        ({"format": "text", "text_field": "body"}, {"text": "x"}, "field body is missing"),
        ({"format": "text"}, {"text": ["x"]}, "field text is a list, not text or a number"),
        ({"system": "Be {mood}.", **ASKED}, ROW, "field mood is missing"),
        ({"format": "alpaca"}, {"instruction": "x", "output": "y"}, None),
        ({"format": "alpaca"}, {"instruction": "x", "input": None, "output": "y"}, None),
        (
            {"format": "alpaca"},
            {"instruction": "x", "input": {"a": 1}, "output": "y"},
            "field input is an object, not text",
        ),
        ({"format": "alpaca"}, {"instruction": "x"}, "field output is missing"),
        ({"format": "messages"}, {"messages": [turn("user"), turn("assistant")]}, None),
        ({"format": "messages"}, {"messages": [turn("system"), turn("user"), turn("tool"), turn("assistant")]}, None),
        ({"format": "messages"}, {"chat": []}, "field messages is missing"),
        ({"format": "messages"}, {"messages": []}, "field messages is an empty list"),
        ({"format": "messages"}, {"messages": "hello"}, "field messages is text, not a list of turns"),
        ({"format": "messages"}, {"messages": ["hello"]}, "a turn in messages is text, not an object"),
        ({"format": "messages"}, {"messages": [{"content": "x"}]}, "field messages[0][role] is missing"),
        ({"format": "messages"}, {"messages": [turn("narrator")]}, "field messages[0][role] is 'narrator'"),
        ({"format": "messages"}, {"messages": [turn("user"), turn("assistant", None)]}, "messages[1][content] is null"),
        ({"format": "messages"}, {"messages": [turn("user", [])]}, "messages[0][content] is a list, not text"),
        ({"format": "messages"}, {"messages": [turn("user")]}, "the last turn is user, not assistant"),
        ({"format": "messages", "train_on": "all"}, {"messages": [turn("user")]}, None),
        ({"format": "messages"}, {"messages": [turn("assistant")]}, "the first turn is assistant, not user"),
        ({"format": "messages"}, {"messages": [turn("system")]}, "the first turn is system, not user"),
        ({"format": "messages"}, {"messages": [turn("user"), turn("system")]}, "a system turn stands after the first"),
        ({"format": "sharegpt"}, {"conversations": [said("human"), said("gpt")]}, None),
        ({"format": "sharegpt"}, {"conversations": [said("narrator")]}, "field conversations[0][from] is 'narrator'"),
        (
            {"format": "sharegpt"},
            {"conversations": [said("human"), said("gpt", "")]},
            "conversations[1][value] is empty",
        ),
        ({"format": "sharegpt", "messages_field": "turns"}, {"conversations": []}, "field turns is missing"),
    ],
)
def test_each_format_is_checked(fields: dict[str, Any], row: Any, message: str | None, tmp_path: Path) -> None:
    found = check(tmp_path / "a.jsonl", [row], **fields)
    assert [where for where, _, _ in found] == ([] if message is None else ["1"])
    assert message is None or message in found[0][1]


def test_reading_rows_loads_nothing_heavy() -> None:
    code = "import ftlaunch.rows, sys; print(*{'numpy', 'torch', 'jinja2', 'pyarrow', 'typer'} & set(sys.modules))"
    launcher = Path(__file__).parents[3] / "launcher"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=launcher)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("template", "fields"),
    [
        ("", []),
        ("no field, {{braces}}", []),
        ("{a}", [("a",)]),
        ("Q: {question}\nA: {answer[value]}{a}", [("question",), ("answer", "value"), ("a",)]),
        (
            "{turns[0][text]} {a column}{x[b.c]}{x[a b]}",
            [("turns", "0", "text"), ("a column",), ("x", "b.c"), ("x", "a b")],
        ),
    ],
)
def test_fields_of_a_template(template: str, fields: list[tuple[str, ...]]) -> None:
    assert template_fields(template) == fields


@pytest.mark.parametrize(
    "template",
    [
        *("{", "}", "{a", "{}", "{0}", "{[a]}", "{a.b}", "{a[b].c}", "{a[b]c}", "{a[]}", "{a[b}", "{a!r}", "{a:>3}"),
        *("{a.__class__.__mro__[1]}", "{a:{b}}", '{"question": {question}}', "{a!}"),
    ],
)
def test_templates_that_are_more_than_fields_are_refused(template: str) -> None:
    with pytest.raises(UserError):
        template_fields(template)


ROWS_OF_TEXT = LINE * 3
MENDED = {
    "commas.jsonl": ROWS_OF_TEXT.replace("}\n", "},\n"),
    "comments.jsonl": f"# made by hand\n{ROWS_OF_TEXT}// the end\n",
    "cr.jsonl": ROWS_OF_TEXT.replace("\n", "\r"),
    "crash.jsonl": f"{ROWS_OF_TEXT}{chr(0) * 4096}",
    "utf16.jsonl": ROWS_OF_TEXT.encode("utf-16-le"),
    "utf16be.csv": "question,answer\nWhy?,Because.\n".encode("utf-16-be"),
    "utf32.jsonl": ROWS_OF_TEXT.encode("utf-32"),
}
RENAMED = {
    "plain.jsonl.gz": (ROWS_OF_TEXT, "plain.jsonl"),
    "packed.jsonl": (bz2.compress(ROWS_OF_TEXT.encode()), "new.jsonl.bz2"),
    "squeezed.jsonl": (lzma.compress(ROWS_OF_TEXT.encode()), "new.jsonl.xz"),
}


@pytest.mark.parametrize("name", [*MENDED, *RENAMED])
def test_what_the_remedy_of_a_broken_file_makes_is_read(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, MENDED[name] if name in MENDED else RENAMED[name][0])
    fields = {"prompt": "{question}", "completion": "{answer}"}
    ((_, _, remedy),) = check_rows(Data(path=str(path), **fields)).problems
    if name in MENDED:
        new = tmp_path / f"new{path.suffix}"
        command = remedy.split("`")[1].replace("FILE", str(path)).replace("NEW", str(new))
        subprocess.run(["bash", "-c", command], check=True)
    else:
        new = path.rename(tmp_path / RENAMED[name][1])
        assert "rename it" in remedy
        assert remedy.endswith((new.suffix, new.name))
    assert check_rows(Data(path=str(new), **fields)).problems == []
    assert next(row for _, row in read_rows(new)) == ROW


@pytest.mark.parametrize(
    ("row", "fields", "problem", "mended"),
    [
        (
            {"question": "2+2?", "choices": ["3", "4"], "answer": 1},
            {},
            "the rows have choices, in the field choices, that no prompt names",
            {"prompt": "{question}\n0: {choices[0]}\n1: {choices[1]}", "completion": "{answer}"},
        ),
        (
            {
                "input": {"messages": [turn("user")]},
                "preferred_output": [turn("assistant")],
                "other": [turn("assistant")],
            },
            {},
            "the rows' fields do not tell their format",
            {
                **{"prompt": "{input[messages][0][content]}", "chosen": "{preferred_output[0][content]}?"},
                **{"rejected": "{other[0][content]}"},
            },
        ),
        ({"prompt": "q", "answers": "a"}, {}, "there is a prompt and no answer to train", {"completion": "{answers}"}),
        (
            {"messages": [turn("user"), {**turn("assistant"), "train_detail": []}]},
            {},
            "field messages[1][train_detail]",
            None,
        ),
        ({"messages": [turn("user"), {**turn("assistant"), "mask": 1}]}, {}, "field messages[1][mask] marks", None),
    ],
)
def test_rows_that_would_be_trained_otherwise_than_they_are_meant(
    row: Any, fields: dict[str, Any], problem: str, mended: dict[str, Any] | None, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", (json.dumps(row) + "\n") * 2)

    def problems(**fields: Any) -> list[str]:
        try:
            found = check_rows(settled(Data(path=str(path), **fields)))
        except DataError as error:
            return [error.problem]
        return [told for _, told, _ in found.problems]

    assert any(problem in told for told in problems(**fields))
    if mended is not None:
        assert problems(**mended) == []


def test_turns_in_columns_are_turns(tmp_path: Path) -> None:
    row = {"conversations": {"from": ["human", "gpt"], "value": ["Why?", "So."]}}
    path = write(tmp_path / "a.jsonl", json.dumps(row) + "\n")
    table = settled(Data(path=str(path)))
    assert table.format == "sharegpt"
    assert [one["content"] for one in conversation_of(table, row, "a").turns] == ["Why?", "So."]
