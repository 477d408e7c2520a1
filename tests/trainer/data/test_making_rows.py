"""Rows made ready before the first step: on all cores as by one, kept where it is stopped, and told of all along."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from tests.trainer.in_process import ALONE, make_data

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.rows import settled
from fttrain.data import cores, tokens
from fttrain.data.chat import Encoder
from fttrain.data.prepare import prepare
from fttrain.distributed.stop_request import StoppedEarly

Writer = Callable[[Any], Path]
ROWS = [{"question": f"What is {number}?", "answer": "More. " * (1 + number % 7)} for number in range(2000)]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "BATCH", 100)


def bytes_of(cache: Path) -> dict[str, bytes]:
    (folder,) = cache.iterdir()
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.usefixtures("small_batches")
def test_all_cores_make_what_one_makes(
    write_rows: Writer, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = [*ROWS[:700], {"question": "Null?", "answer": None}, *ROWS[700:], {"question": "No answer?"}]
    data = make_data(write_rows(rows), test=5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    one = tokens.tokenize(data, tokenizer, 1, tmp_path / "one")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    two = tokens.tokenize(data, tokenizer, 1, tmp_path / "two")
    assert one.counts == two.counts
    assert one.counts.unfit == {"field answer is null": 1, "field answer is missing": 1}
    assert ":701: " in one.counts.examples[0]
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


class Cut(Exception):
    """The process was ended."""


def test_a_home_that_cannot_be_written_is_told_with_a_way_out(write_rows: Writer, tokenizer: Any, tmp_path: Path):
    home = tmp_path / "home"
    home.write_text("no folder, and nothing can be made in it\n")
    with pytest.raises(UserError, match="tokens cannot be kept in ") as told:
        tokens.tokenize(make_data(write_rows(ROWS[:3])), tokenizer, 1, home / "tokens")
    assert "XDG_CACHE_HOME" in told.value.remedy


def test_what_rows_say_with_a_field_that_is_not_read_is_refused_in_any_of_them(
    write_rows: Writer, tokenizer: Any, tmp_path: Path
):
    path = write_rows([*ROWS, {**ROWS[0], "image": "a.png"}])
    data = settled(Data(path=str(path)))
    for written_out in (None, "ignore"):  # what they leave in the cache tells nothing of the field
        kept = tokens.tokenize(replace(data, unread=written_out), tokenizer, 1, tmp_path / "cache")
        assert kept.counts.kept == len(ROWS) + 1
    with pytest.raises(UserError, match=f":{len(ROWS) + 1}: the field image holds what is no text"):
        tokens.tokenize(data, tokenizer, 1, tmp_path / "cache")
    with pytest.raises(UserError, match="the field image"):
        list(tokens.stream(replace(data, streaming=True), tokenizer, 1))


def test_a_set_of_an_earlier_version_tells_no_number_that_nobody_counted(
    write_rows: Writer, tokenizer: Any, tmp_path: Path
):
    data = make_data(write_rows(ROWS[:3]))
    assert tokens.tokenize(data, tokenizer, 1, tmp_path / "cache").counts.respaced == 0
    (meta,) = tmp_path.glob("cache/*/meta.json")
    earlier = json.loads(meta.read_text())
    del earlier["counts"]["respaced"]
    meta.write_text(json.dumps(earlier))
    assert tokens.tokenize(data, tokenizer, 1, tmp_path / "cache").counts.respaced is None


@pytest.mark.usefixtures("small_batches")
def test_what_is_done_is_kept(write_rows: Writer, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    data = make_data(write_rows([{"question": "No answer?"}, *ROWS]))
    calm = tokens.tokenize(data, tokenizer, 1, tmp_path / "calm")

    def cut(rows: int) -> None:
        if rows >= 1200:
            raise Cut

    with pytest.raises(Cut):
        tokens.tokenize(data, tokenizer, 1, tmp_path / "cut", told=cut)
    encoded = 0
    encode_many = Encoder.encode_many

    def counting(self: Encoder, rows: Any) -> Any:
        nonlocal encoded
        encoded += len(rows)
        return encode_many(self, rows)

    monkeypatch.setattr(Encoder, "encode_many", counting)
    again = tokens.tokenize(data, tokenizer, 1, tmp_path / "cut")
    assert encoded == 801
    assert again.counts == calm.counts
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "calm")


@pytest.mark.usefixtures("small_batches")
def test_another_node_goes_on_with_what_one_has_left(
    write_rows: Writer, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = make_data(write_rows(ROWS))

    def cut(rows: int) -> None:
        if rows >= 300:
            raise Cut

    monkeypatch.setattr("socket.gethostname", lambda: "n1")
    with pytest.raises(Cut):
        tokens.tokenize(data, tokenizer, 1, tmp_path / "cache", told=cut)
    (left,) = (tmp_path / "cache").iterdir()
    assert json.loads((left / "kept.json").read_text())["state"]["rows"] >= 300
    an_hour_ago = time.time() - 3600
    os.utime(left / "kept.json", (an_hour_ago, an_hour_ago))
    monkeypatch.setattr("socket.gethostname", lambda: "n2")
    seen: list[int] = []
    tokens.tokenize(data, tokenizer, 1, tmp_path / "cache", told=seen.append)
    assert min(seen[1:]) >= 300
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.usefixtures("small_batches")
def test_a_stop_is_heeded_and_told_of(
    write_rows: Writer, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fttrain.data.prepare.ROUND_SECONDS", 0.01)
    monkeypatch.setattr(cores, "ALONE", 10**9)
    data, progress = make_data(write_rows(ROWS)), tmp_path / "preparing.json"
    told: list[dict[str, Any]] = []

    def asked() -> str | None:
        if progress.exists():
            told.append(json.loads(progress.read_text()))
        return "SIGTERM" if told else None

    with pytest.raises(StoppedEarly, match="SIGTERM"):
        prepare([data], tokenizer, tmp_path / "cache", ALONE, asked, progress)
    assert told[0]["data"] == data.path
    assert 0 < told[0]["rows"] < len(ROWS)
    assert not progress.exists()
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.startswith(".making-")
    ((key,),) = prepare([data], tokenizer, tmp_path / "cache", ALONE)
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == [key]
