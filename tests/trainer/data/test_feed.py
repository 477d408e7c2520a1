"""Which rows come in which step, from tables and from streams: seen in the micro-batches that a rank is given."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch
from tests.trainer.in_process import ALONE, make_data, make_step
from transformers import AutoTokenizer

from ftlaunch.errors import UserError
from ftlaunch.recipe.stages import Sft
from ftlaunch.run.spec import StageSpec
from fttrain.data import feed as feeds
from fttrain.data.batches import MicroBatch
from fttrain.data.chat import Encoder
from fttrain.distributed.world import World

Row = tuple[int, ...]
"""A row's tokens."""


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def file_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Writes a file of so many rows, each different from all others, its name in every one of them."""
    folder = tmp_path_factory.mktemp("feed")

    def write(name: str, count: int) -> Path:
        rows = ({"question": f"{name} {n}", "answer": f"{name} {n}{'!' * (n % 5)}"} for n in range(count))
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call that encoded any."""
    calls: list[int] = []
    encode_many = Encoder.encode_many

    def counting(self: Encoder, rows: Any) -> Any:
        calls.append(len(rows))
        return encode_many(self, rows)

    monkeypatch.setattr(Encoder, "encode_many", counting)
    return calls


def build(spec: StageSpec, tokenizer: Any, world: World = ALONE) -> feeds.Feed:
    return feeds.build(spec, cast("Sft", spec.stage), tokenizer, world)


def rows_of(micros: Iterable[MicroBatch]) -> list[Row]:
    """The rows that lie in micro-batches, cut apart where positions begin again; empty slots left out."""
    rows: list[Row] = []
    for micro in micros:
        for ids, positions, lengths in zip(micro.input_ids, micro.position_ids, micro.lengths, strict=True):
            for start in torch.nonzero((positions == 0) & (lengths > 1)).flatten().tolist():
                rows.append(tuple(ids[start : start + int(lengths[start])].tolist()))
    return rows


def source_of(row: Row, tokenizer: Any) -> str:
    """The name that a row's file has."""
    return tokenizer.decode(row).split("user\n")[1].split()[0]


def same(micro: MicroBatch, other: MicroBatch) -> bool:
    return torch.equal(micro.input_ids, other.input_ids) and torch.equal(micro.targets_N, other.targets_N)


def test_a_stream_goes_on_where_it_was(tiny_model: Path, tokenizer: Any, file_of: Any):
    data = make_data(file_of("s", 20), streaming=True, test=4)
    step = make_step(tiny_model, data, batch_size=6, micro_batch_size=3, steps=8)
    unbroken = build(step, tokenizer)
    assert unbroken.num_steps == 8
    assert unbroken.epoch_at(3) is None
    taken = {number: unbroken.step(number) for number in range(1, 9)}
    assert [len(micros) for micros in taken.values()] == [2] * 8
    again = build(step, tokenizer)
    for number in (5, 6, 8):  # in the second epoch, and with a step left out
        assert all(same(*pair) for pair in zip(again.step(number), taken[number], strict=True))


def test_a_resumed_stream_encodes_nothing_that_it_has_passed(
    tiny_model: Path, tokenizer: Any, file_of: Any, encoded: list[int]
):
    datas = [make_data(file_of(name, rows), streaming=True, test=0) for name, rows in (("s", 300), ("t", 70))]
    step = make_step(tiny_model, *datas, batch_size=30, micro_batch_size=30, steps=40)
    unbroken = build(step, tokenizer)
    saved, taken = {}, {}
    for number in range(1, 41):  # several epochs
        taken[number] = unbroken.step(number)
        saved[number] = unbroken.state_dict()
    assert len({tensors["position"].shape for tensors in saved.values()}) == 1
    for number in (1, 9, 10, 11, 12, 13, 39):
        again = build(step, tokenizer)
        again.load_state_dict(saved[number])
        encoded.clear()
        assert all(same(*pair) for pair in zip(again.step(number + 1), taken[number + 1], strict=True))
        assert sum(encoded) <= 30 + 2 * 64 + 2, "what is read in advance, and two rows to find the place"
        assert again.counts() == counted(unbroken, saved[number + 1])


def counted(feed: Any, tensors: Any) -> Any:
    feed.load_state_dict(tensors)
    return feed.counts()


def test_a_stream_never_trains_a_row_held_out_and_all_others_once_an_epoch(
    tiny_model: Path, tokenizer: Any, file_of: Any
):
    data = make_data(file_of("s", 20), streaming=True, test=4)
    feed = build(make_step(tiny_model, data, batch_size=8, steps=6), tokenizer)
    epochs = [[row for number in (first, first + 1) for row in rows_of(feed.step(number))] for first in (1, 3, 5)]
    held_out = rows_of(feed.evaluation())
    assert len(set(held_out)) == 4
    assert all(Counter(epoch) == Counter(epochs[0]) for epoch in epochs)
    assert len(set(epochs[0])) == 16
    assert not set(epochs[0]) & set(held_out)
    assert epochs[0] != epochs[1]
    assert rows_of(feed.evaluation()) == held_out


def test_ranks_share_a_streams_steps(tiny_model: Path, tokenizer: Any, file_of: Any):
    data = make_data(file_of("s", 20), streaming=True, test=3)
    step = make_step(tiny_model, data, batch_size=8, steps=3)
    halved = msgspec.structs.replace(step, micro_batch_size=2, accumulation=2, world_size=2)
    alone = build(step, tokenizer)
    ranks = [build(halved, tokenizer, replace(ALONE, rank=rank, size=2)) for rank in range(2)]
    for number in (1, 2, 3):
        parts = [rows_of(rank.step(number)) for rank in ranks]
        assert [len(part) for part in parts] == [4, 4]
        assert Counter(parts[0] + parts[1]) == Counter(rows_of(alone.step(number)))
    rounds = [list(rank.evaluation()) for rank in ranks]
    assert len(rounds[0]) == len(rounds[1]) == 1
    assert Counter(rows_of(rounds[0] + rounds[1])) == Counter(rows_of(alone.evaluation()))


@pytest.mark.parametrize("streaming", [True, False])
def test_a_mixture_follows_its_weights(streaming: bool, tiny_model: Path, tokenizer: Any, file_of: Any):
    datas = [
        make_data(file_of("much", 30), streaming=streaming, weight=3.0),
        make_data(file_of("some", 50), streaming=streaming, weight=1.0, test=2),
    ]
    feed = build(make_step(tiny_model, *datas, batch_size=39, steps=10), tokenizer)
    rows = [row for number in range(1, 11) for row in rows_of(feed.step(number))]
    shares = Counter(source_of(row, tokenizer) for row in rows)
    assert sum(shares.values()) == 390
    assert shares["much"] == pytest.approx(390 * 3 / 4, abs=25)
    assert max(Counter(row for row in rows if source_of(row, tokenizer) == "some").values()) <= 4
    held_out = rows_of(feed.evaluation())
    assert [source_of(row, tokenizer) for row in held_out] == ["some", "some"]
    assert not set(held_out) & set(rows)


def test_tables_are_each_split_and_tokenized_once(tiny_model: Path, tokenizer: Any, file_of: Any, encoded: list[int]):
    datas = [make_data(file_of("a", 24), test=4), make_data(file_of("b", 14), test=4)]
    step = make_step(tiny_model, *datas, batch_size=8, epochs=2.0)
    feed = build(step, tokenizer)
    assert sum(encoded) == 24 + 14
    assert feed.num_steps == 8  # 20 + 10 rows are 4 steps an epoch, the last of 6 rows
    taken = {number: rows_of(feed.step(number)) for number in range(1, 9)}
    assert [len(rows) for rows in taken.values()] == [8, 8, 8, 6] * 2
    held_out = rows_of(feed.evaluation())
    assert Counter(source_of(row, tokenizer) for row in held_out) == {"a": 4, "b": 4}
    trained = {row for rows in taken.values() for row in rows}
    assert not trained & set(held_out)
    assert feed.epoch_at(6) == 1.5

    encoded.clear()
    again = build(step, tokenizer)
    assert {number: rows_of(again.step(number)) for number in (7, 2)} == {number: taken[number] for number in (7, 2)}
    assert rows_of(again.evaluation()) == held_out
    assert not encoded


def test_streams_and_tables_do_not_mix(tiny_model: Path, tokenizer: Any, file_of: Any):
    datas = [make_data(file_of("s", 20), streaming=True), make_data(file_of("t", 20))]
    with pytest.raises(UserError, match="streaming and other data sets are mixed") as caught:
        build(make_step(tiny_model, *datas), tokenizer)
    assert "for all of a stage's data sets" in caught.value.remedy
