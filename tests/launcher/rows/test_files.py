"""Which files a path names, and what their content makes of them."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.recipe.data import Data
from ftlaunch.rows import check_rows
from ftlaunch.rows.files import data_files
from ftlaunch.rows.readers import read_rows
from ftlaunch.rows.template import DataError

ROWS = [{"q": "2+2?", "a": "4"}, {"q": "3+3?", "a": "6"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = "q,a\n2+2?,4\n3+3?,6\n"


def rows_of(path: Path, content: str | bytes) -> list[dict[str, Any]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [row for _, row in read_rows(path)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", LINES),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.ndjson", LINES),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.jsonl", "".join(json.dumps(row, indent=2) + "\n" for row in ROWS)),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.json", json.dumps({"version": 1, "data": ROWS}, indent=1)),
        ("a.json", json.dumps({"q": ["2+2?", "3+3?"], "a": ["4", "6"]})),
        ("a.json", json.dumps({"q": {"0": "2+2?", "1": "3+3?"}, "a": {"0": "4", "1": "6"}})),
        ("a.json", json.dumps(dict(enumerate(ROWS)))),
        ("a.json", json.dumps({"columns": ["q", "a"], "index": [0, 1], "data": [["2+2?", "4"], ["3+3?", "6"]]})),
        ("a.csv", TABLE),
        ("a.csv", TABLE.replace(",", ";")),
        ("a.csv", "sep=;\n" + TABLE.replace(",", ";")),
        ("a.csv", TABLE.replace(",", "|")),
        ("a.tsv", TABLE.replace(",", "\t")),
        ("a.csv", 'q, a\n"2+2?", "4"\n"3+3?", "6"\n'),
        ("a.csv", ",q,a\n0,2+2?,4\n1,3+3?,6\n"),
        ("a.csv", TABLE.encode("utf-16")),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.json", json.dumps(ROWS).encode("utf-16")),
        ("a.csv.gz", gzip.compress(TABLE.encode(), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())),
        ("a.json.xz", lzma.compress(json.dumps(ROWS).encode())),
    ],
)
def test_content_tells_what_a_file_holds(name: str, content: str | bytes, tmp_path: Path) -> None:
    assert rows_of(tmp_path / name, content) == ROWS


def test_zstandard(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the trainer's packages are not installed")
    packed: Any = pyarrow.compress(LINES.encode(), codec="zstd", asbytes=True)
    assert rows_of(tmp_path / "a.jsonl.zst", packed) == ROWS


def test_a_list_on_one_long_line_is_read_in_pieces(tmp_path: Path) -> None:
    rows = [{"n": number, "t": "é" * (number % 997 * 4), "f": -1.5e-3, "ok": True} for number in range(6000)]
    assert rows_of(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False)) == rows
    places = [where for where, _ in read_rows(tmp_path / "a.json")]
    assert places[-1].endswith("a.json:1 (row 6000)")


def test_numbers_keep_how_they_are_written(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path / "a.jsonl", '{"a": 1.50, "b": 1e3, "c": 7}\n')
    assert [str(row[key]) for key in "abc"] == ["1.50", "1e3", "7"]
    assert row == {"a": 1.5, "b": 1000, "c": 7}


@pytest.mark.parametrize(
    "row", [{"messages": [{"role": "user", "content": "x"}]}, {"chosen": [{"role": "a"}], "rejected": [{"role": "b"}]}]
)
def test_a_single_conversation_is_a_row(row: dict[str, Any], tmp_path: Path) -> None:
    assert rows_of(tmp_path / "a.json", json.dumps(row)) == [row]
    assert rows_of(tmp_path / "a.jsonl", json.dumps({"tags": ["x", "y"]})) == [{"tags": ["x", "y"]}]


def test_several_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="several lists of rows: train, test"):
        rows_of(tmp_path / "a.json", json.dumps({"train": ROWS, "test": ROWS}))


def test_tables_of_columns(tmp_path: Path) -> None:
    pyarrow: Any = pytest.importorskip("pyarrow", reason="the trainer's packages are not installed")
    from pyarrow import ipc, parquet

    rows = [{"m": [{"a": "x", "b": None}, {"a": None, "b": "y"}], "n": None}]
    table = pyarrow.Table.from_pylist(rows).append_column("f", pyarrow.array([0.1], pyarrow.float32()))
    parquet.write_table(table, tmp_path / "a.parquet")
    with ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as file:
        file.write_table(table)
    with ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as stream:
        stream.write_table(table)
    for name in ("a.parquet", "file.arrow", "stream.arrow"):
        assert [row for _, row in read_rows(tmp_path / name)] == [{"m": [{"a": "x"}, {"b": "y"}], "n": None, "f": 0.1}]


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(LINES)
    return folder


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        (("a.jsonl", "b.jsonl"), "train", ["a.jsonl", "b.jsonl"]),
        (("a.jsonl", "test.jsonl"), "train", ["a.jsonl"]),
        (("train.jsonl", "train_2.jsonl", "dev.jsonl"), "train", ["train.jsonl", "train_2.jsonl"]),
        (("train.jsonl", "my-dev.jsonl"), "validation", ["my-dev.jsonl"]),
        (("train/a.jsonl", "test/a.jsonl"), "train", ["train/a.jsonl"]),
        (("data/train_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl"), "train_sft", None),
        (("latest.jsonl", "contest.jsonl"), "train", ["contest.jsonl", "latest.jsonl"]),
        (
            ("a.jsonl", "README.md", "readme.txt", "dataset_info.json", ".cache/b.jsonl", "~$a.csv"),
            "train",
            ["a.jsonl"],
        ),
        (("a.txt", "b.jsonl"), "train", ["b.jsonl"]),
        (("part-00000-of-00001.jsonl",), "train", None),
        (("test/part-00000-of-00001.jsonl", "train/part-00000-of-00001.jsonl"), "test", None),
    ],
)
def test_names_tell_splits(names: tuple[str, ...], split: str, chosen: list[str] | None, tmp_path: Path) -> None:
    found = data_files(files(tmp_path, *names), split)
    assert [str(path.relative_to(tmp_path)) for path in found] == (chosen or [names[0]])


@pytest.mark.parametrize(
    ("names", "split", "said"),
    [
        (("test.jsonl",), "train", "by their names they are test"),
        (("train_sft-00000-of-00001.jsonl",), "train", "by their names they are train_sft"),
        (("a.jsonl",), "validation", "by their names they are of none"),
    ],
)
def test_a_run_never_takes_another_split(names: tuple[str, ...], split: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        data_files(files(tmp_path, *names), split)


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (("data/train-00000-of-00003.jsonl", "data/train-00002-of-00003.jsonl"), "data/train-*"),
        (("part-00001-of-00002.jsonl",), "part-*"),
    ],
)
def test_a_file_that_others_count_is_missed(names: tuple[str, ...], pattern: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"only {len(names)} of \d files are there") as error:
        data_files(files(tmp_path, *names))
    assert str(tmp_path / pattern) in error.value.remedy
    assert len(data_files(tmp_path / pattern)) == len(names)


def test_a_copy_with_several_data_sets_is_refused_as_the_hub_does(tmp_path: Path) -> None:
    files(tmp_path, "main/train-00000-of-00001.jsonl", "socratic/train-00000-of-00001.jsonl")
    named = "".join(f"- config_name: {name}\n  data_files: {name}/train-*\n" for name in ("main", "socratic"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{named}---\n# Data\nconfig_name: third\n")
    with pytest.raises(DataError, match="several data sets: main, socratic\n"):
        data_files(tmp_path)
    for one in (tmp_path / "main", tmp_path / "main/train-*"):
        assert [file.parent.name for file in data_files(one)] == ["main"]
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n---\n")
    assert len(data_files(tmp_path)) == 2


@pytest.mark.parametrize(
    ("names", "unread"),
    [
        (("train.jsonl", "test.jsonl", "more/b.jsonl", "notes.txt", "a.md"), "b.jsonl"),
        (("a.jsonl", "b.zip", "c.xlsx", "test.jsonl"), "b.zip, c.xlsx"),
        (("a.jsonl", "test.jsonl"), None),
    ],
)
def test_files_that_no_split_has_are_named(names: tuple[str, ...], unread: str | None, tmp_path: Path) -> None:
    files(tmp_path, *names)
    wanted = [] if unread is None else [f"files that are not read: {unread}"]
    for place in (tmp_path, tmp_path / "**/*"):
        assert [
            note for note in check_rows(Data(path=str(place), format="text", text_field="q")).notes if "files" in note
        ] == wanted


@pytest.mark.parametrize(
    ("name", "remedy"), [("a.zip", "unpack it"), ("a.tar.gz", "unpack it"), ("a.xlsx", "save it as")]
)
def test_files_that_are_not_read_have_a_remedy(name: str, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="are not read") as caught:
        data_files(files(tmp_path, name) / name)
    assert caught.value.remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("content", "problem", "remedy"),
    [
        ("{'q': 'a'}\n{'q': None}\n", "a.jsonl:1: not JSON: ", "these are Python's values"),
        ('{"q": "a"}\n{"q": True}\n', "a.jsonl:2: not JSON: ", "these are Python's values"),
        ('{"q": "a"}\n{"q": ' + "1" * 5000 + "}\n", "a.jsonl:2: not JSON: a number has", "leave such rows out"),
        ("[" + '{"q": ' + "1" * 5000 + "}]", "a.jsonl:1: not JSON, in the row .* a number has", "leave such rows out"),
        ('{"q": ' + "[" * 10**5 + "]" * 10**5 + "}", "a.jsonl:1: not JSON: a value nests", "leave such rows out"),
        ('{"q": 1}{"q": 2}\n', "a.jsonl:1: not JSON: Extra data", "write one object a line: `jq -c . FILE > NEW`"),
        ('[{"q": 1},\n{"q": 2},\n]', "a.jsonl:3: not a JSON list", "write the file"),
    ],
)
def test_what_is_no_json_is_told_with_what_mends_it(content: str, problem: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=problem) as caught:
        list(read_rows(tmp_path / "a.jsonl"))
    assert caught.value.remedy.startswith(remedy)
    if "Python" in remedy:
        command = caught.value.remedy.partition("`")[2].rstrip("`")
        command = command.replace("FILE", "a.jsonl").replace("NEW", "b.jsonl").replace("python3", sys.executable)
        if content.startswith("{'"):
            subprocess.run(command, shell=True, cwd=tmp_path, check=True)
            assert [row for _, row in read_rows(tmp_path / "b.jsonl")] == [{"q": "a"}, {"q": None}]


def test_patterns(tmp_path: Path) -> None:
    files(tmp_path, "parts/a.jsonl", "parts/b.jsonl", "parts/test.jsonl", "parts/c.md")
    assert [path.name for path in data_files(tmp_path / "parts" / "*.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert [path.name for path in data_files(tmp_path / "**" / "*")] == ["a.jsonl", "b.jsonl"]
    files(tmp_path, "odd[1].jsonl")
    assert data_files(tmp_path / "odd[1].jsonl") == [tmp_path / "odd[1].jsonl"]


ODD = {
    "old_mac.csv": (b"prompt,completion\ra?,b\rc?,d\r", "not CSV", "lines end in CR alone"),
    "digits.jsonl": (
        b'{"prompt": ' + b"9" * 5000 + b"}\n",
        "not JSON: a number has too many digits",
        "write the number as text",
    ),
    "sheet.csv": (b"PK\x03\x04\x14\x00", "is a zip archive", "save the sheet as"),
    "damaged.jsonl.gz": (
        gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:12] + b"\xff" * 20,
        "cannot be read",
        "",
    ),
    "twice.jsonl.gz": (
        gzip.compress(gzip.compress(b'{"prompt": "a"}\n', mtime=0), mtime=0),
        "packed twice",
        "unpack it",
    ),
    "packed.jsonl": (gzip.compress(b'{"prompt": "a"}\n', mtime=0), "is packed with gzip", "ends in .gz"),
}


@pytest.mark.parametrize("name", ODD)
def test_files_that_are_not_what_their_name_says_are_told_for_what_they_are(name: str, tmp_path: Path) -> None:
    content, message, remedy = ODD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as told:
        list(read_rows(tmp_path / name))
    assert remedy in told.value.remedy


def test_folders_behind_links_are_looked_into_once(tmp_path: Path) -> None:
    (tmp_path / "elsewhere/inner").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    for name in ("elsewhere/inner/b.jsonl", "data/a.jsonl"):
        (tmp_path / name).write_text(LINES)
    for name, target in (("linked", "../elsewhere"), ("again", "../elsewhere"), ("up", ".."), ("self", "self")):
        (tmp_path / "data" / name).symlink_to(target)
    found = data_files(tmp_path / "data")
    assert [path.resolve().relative_to(tmp_path.resolve()) for path in found] == [
        Path("data/a.jsonl"),
        Path("elsewhere/inner/b.jsonl"),
    ]


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="is neither a file nor a folder"):
        data_files(tmp_path / "pipe.jsonl")
    (tmp_path / "a.jsonl").write_text(LINES)
    assert [path.name for path in data_files(tmp_path)] == ["a.jsonl"]


def test_a_folder_that_may_not_be_looked_into_is_named(tmp_path: Path) -> None:
    """Instead of its rows being left out without a word. Root may look into all, so a child asks as nobody."""
    (tmp_path / "locked").mkdir(mode=0)
    (tmp_path / "a.jsonl").write_text(LINES)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    # What is imported comes first, as the packages may lie where only root may look.
    call = "import os, sys, pathlib; from ftlaunch.rows.files import data_files; os.getuid() or os.setuid(65534)"
    done = subprocess.run(
        [sys.executable, "-c", f"{call}; data_files(pathlib.Path(sys.argv[1]))", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"DataError: {tmp_path / 'locked'}: cannot be read: Permission denied" in done.stderr


def test_files_that_were_joined_have_byte_order_marks_inside(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "a.jsonl", "\ufeff" + LINES + "\ufeff" + LINES) == [*ROWS, *ROWS]


def test_tables_with_values_that_python_has_not_are_refused_by_name(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    odd = {
        "a value is none that can be read": pyarrow.array([-(10**15)]).cast(pyarrow.timestamp("s")),
        "'utf-8' codec can't decode": pyarrow.StringArray.from_buffers(
            1, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")
        ),
    }
    for problem, column in odd.items():
        parquet.write_table(pyarrow.table({"q": column}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=problem):
            list(read_rows(tmp_path / "a.parquet"))
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["q", "q"])
    parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'q' is there twice"):
        list(read_rows(tmp_path / "a.parquet"))


@pytest.mark.parametrize(("other", "first"), [("train.csv", ".csv"), ("train.jsonl.gz", ".jsonl")])
def test_an_export_of_a_file_next_to_it_is_not_read_as_more_rows(other: str, first: str, tmp_path: Path):
    for name in ("train.jsonl", "train.v2.jsonl", other, "test.csv", "test.v1.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(DataError, match="differ in their kind alone") as caught:
        data_files(tmp_path)
    assert caught.value.remedy.endswith(f"a pattern: {tmp_path}/*{first}")
    assert [file.name for file in data_files(tmp_path / "*.jsonl")] == ["train.jsonl", "train.v2.jsonl"]
    assert len(data_files(tmp_path, "test")) == 2
