"""Rows from files and from data sets of the hub, of which `datasets` has copies."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from tests.trainer.hub_cache import NEW, OLD, forget_opened, keep, without_network
from tests.trainer.in_process import make_step

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.rows.template import DataError
from fttrain.data import sources
from fttrain.data.sources import fingerprint, load_rows, stream_rows, with_formats

ROWS = [{"text": f"row {number}"} for number in range(2500)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "a.csv").write_text("text\nfirst\n")
    return tmp_path


def make_data(path: object, **fields: Any) -> Data:
    return Data(path=str(path), format="text", **fields)


def texts(rows: sources.Rows) -> list[str]:
    return [row["text"] for _, row in rows]


def test_a_folder_is_read_in_the_order_of_its_files(folder: Path) -> None:
    rows = list(load_rows(make_data(folder)))
    assert rows[:2] == [(f"{folder}/a.csv:2", {"text": "first"}), (f"{folder}/b.jsonl:1", {"text": "row 0"})]
    assert len(rows) == 2501
    assert texts(load_rows(make_data(folder, limit=3))) == ["first", "row 0", "row 1"]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    rows = [{"messages": [{"role": "user", "content": str(number)}]} for number in range(1500)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    loaded = list(load_rows(make_data(path)))
    assert [row for _, row in loaded] == rows
    assert loaded[1200][0] == f"{path} (row 1201)"
    parquet.write_table(pyarrow.Table.from_pylist(rows).slice(0, 0), path)
    with pytest.raises(DataError, match="no rows"):
        list(load_rows(make_data(path)))
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as parquet"):
        list(load_rows(make_data(path)))


def test_the_fingerprint_follows_the_contents(folder: Path) -> None:
    before = fingerprint(make_data(folder))
    assert fingerprint(make_data(folder, limit=3)) == before
    os.utime(folder / "a.csv", (0, 0))
    assert fingerprint(make_data(folder)) == before
    (folder / "a.csv").write_text("text\nfirsT\n")
    assert fingerprint(make_data(folder)) != before


def test_a_local_stream_is_shuffled_by_the_seed_and_loses_nothing(folder: Path) -> None:
    data = make_data(folder / "b.jsonl", limit=2400)
    first = texts(stream_rows(data, seed=1, skip=100))
    assert sorted(first) == sorted(row["text"] for row in ROWS[100:2400])
    assert first == texts(stream_rows(data, seed=1, skip=100))
    assert first != texts(stream_rows(data, seed=2, skip=100))
    assert first != sorted(first)
    drawn_from = {row["text"] for row in ROWS[100:1101]}
    assert set(first[:1]) <= drawn_from


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of `datasets`, which holds owner/rows."""
    without_network(monkeypatch, tmp_path)
    keep(tmp_path, OLD, ROWS)
    return tmp_path


def test_hub_rows(hub: Path) -> None:
    rows = list(load_rows(make_data("owner/rows", limit=2)))
    assert rows == [("owner/rows[train] (row 0)", ROWS[0]), ("owner/rows[train] (row 1)", ROWS[1])]
    data = make_data("owner/rows")
    assert fingerprint(data) == f"owner/rows@{OLD} None train", "no time of a file, which differs from node to node"
    assert fingerprint(make_data("owner/rows", split="train[:10]")) != fingerprint(data)
    # The newest copy is what a branch stands for; an older commit is read when it is named, and no other for it.
    keep(hub, NEW, ROWS[5:7])
    forget_opened()
    assert texts(load_rows(data)) == ["row 5", "row 6"]
    assert len(texts(load_rows(make_data("owner/rows", revision=OLD)))) == len(ROWS)
    assert fingerprint(make_data("owner/rows", revision=OLD)).startswith(f"owner/rows@{OLD}")
    with pytest.raises(UserError, match="cannot be had at commit 3333"):
        list(load_rows(make_data("owner/rows", revision="3" * 40)))


def test_fields_that_only_other_hub_rows_have_are_taken_out() -> None:
    row = {"messages": [{"role": "user", "content": "x", "tool_calls": None}], "n": None}
    ((_, read),) = sources._hub_rows([row], make_data("owner/name"), "row")
    assert read == {"messages": [{"role": "user", "content": "x"}], "n": None}


class FakeStream:
    """Records what is asked of an IterableDataset, which takes torch to import."""

    def __init__(self, asked: list[Any]) -> None:
        self.asked = asked

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: (self.asked.append((name, args, kwargs)), self)[1]

    def __iter__(self) -> Any:
        return iter(ROWS[:1])


def test_a_hub_stream_skips_before_it_shuffles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    opened: list[Any] = []
    monkeypatch.setattr(sources, "_open", lambda *args: (opened.append(args), FakeStream(asked))[1])
    data = make_data("owner/name", streaming=True, limit=50, revision="v1", config="en", split="dev")
    assert list(stream_rows(data, seed=7, skip=5)) == [("owner/name[dev] (shuffled row 0)", ROWS[0])]
    assert opened == [("owner/name", "en", "dev", "v1", True)]
    assert asked == [("take", (50,), {}), ("skip", (5,), {}), ("shuffle", (), {"seed": 7, "buffer_size": 1000})]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"split": "dev"}, 'Unknown split "dev"'),
        ({"config": "fr"}, "Couldn't find cache for owner/rows for config 'fr'"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_the_hub_does_not_have(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        list(load_rows(make_data("owner/rows", **fields)))
    assert said in caught.value.message
    assert "check `config`, `split` and `revision`" in caught.value.remedy


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the data set 'no-owner/no-data' cannot be had") as caught:
        list(load_rows(make_data("no-owner/no-data")))
    assert "check the network" in caught.value.remedy


def test_a_data_set_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.exceptions import DatasetNotFoundError

    def missing(*_: object, **__: object) -> None:
        raise DatasetNotFoundError("Dataset 'no/data' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr("datasets.load_dataset_builder", missing)
    with pytest.raises(UserError, match="the hub has no data set 'no/data'"):
        list(load_rows(make_data("no/data")))


def test_optional_fields_that_a_data_set_of_the_hub_lacks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_network(monkeypatch, tmp_path)
    keep(tmp_path, OLD, [{"p": "q", "context": None, "a": "x"} for _ in range(3)])
    data = Data(path="owner/rows", prompt="{p}{?\n{context}}", completion="{a}")
    assert with_formats(make_step(tmp_path, data)).data == {"rows0": data}
    misspelt = replace(data, prompt="{p}{?\n{contxt}}")
    with pytest.raises(UserError, match="no row has the field contxt, which a template names as optional"):
        with_formats(make_step(tmp_path, misspelt))
