"""Which rows make a step, who computes them, and how they lie."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fttrain.data.batches import balance, split_batch
from fttrain.data.chat import Encoded
from fttrain.data.drawn import drawn
from fttrain.data.node_arrays import NodeArrays
from fttrain.data.order import Order
from fttrain.data.segments import Segments
from fttrain.data.token_set import Group, Tokens, token_set

CPU = torch.device("cpu")


def singles(rows: list[Tokens]) -> list[Group]:
    return [Group((row,)) for row in rows]


def test_every_row_once_an_epoch_in_a_new_order_each_time():
    order = Order([10], [1.0], batch_size=4, seed=3)
    assert order.steps_per_epoch == 3
    epochs = [[row for step in range(first, first + 3) for row in order.step(step)] for first in (1, 4)]
    assert [len(order.step(step)) for step in (1, 2, 3)] == [4, 4, 2]
    assert all(sorted(rows) == [(0, index) for index in range(10)] for rows in epochs)
    assert epochs[0] != epochs[1]
    assert order.step(2) == Order([10], [1.0], batch_size=4, seed=3).step(2)
    assert order.step(2) != Order([10], [1.0], batch_size=4, seed=4).step(2)


def test_steps_follow_from_epochs():
    order = Order([10], [1.0], batch_size=4, seed=3)
    assert order.num_steps(epochs=None, steps=None) == 3
    assert order.num_steps(epochs=2.5, steps=None) == 8
    assert order.num_steps(epochs=None, steps=7) == 7


def test_a_mixture_draws_by_weight_and_repeats_no_row_before_all_have_come():
    order = Order([30, 10], [1.0, 1.0], batch_size=8, seed=0)
    rows = [row for step in range(1, 6) for row in order.step(step)]
    assert Counter(source for source, _ in rows) == {0: 20, 1: 20}
    assert Counter(Counter(row for row in rows if row[0] == 1).values()) == {2: 10}
    second = [row for step in range(6, 11) for row in order.step(step)]
    assert len({row for row in rows + second if row[0] == 0}) == 30


def test_slots_are_even_in_tokens_and_bounded_in_rows():
    lengths = [100, 90, 20, 10, 10, 10, 5, 5]
    slots = balance(lengths, 4)
    assert sorted(row for slot in slots for row in slot) == list(range(8))
    assert all(len(slot) <= 2 for slot in slots)
    assert max(sum(lengths[row] for row in slot) for slot in slots) <= 105
    assert [len(slot) for slot in balance([7], 3)] == [1, 0, 0]


def one_by_one(lengths: list[int], slots: int) -> list[list[int]]:
    """The definition: longest row first, each to the lightest slot that is not full."""
    limit = -(-len(lengths) // slots)
    members: list[list[int]] = [[] for _ in range(slots)]
    for row in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        load = [sum(lengths[one] for one in slot) for slot in members]
        members[min((s for s in range(slots) if len(members[s]) < limit), key=lambda s: (load[s], s))].append(row)
    return members


def test_slots_are_those_of_the_definition():
    draw = np.random.default_rng(0)
    for rows, slots in [(0, 3), (1, 4), (7, 7), (40, 6), (65, 16)]:
        lengths = draw.integers(1, 9, rows).tolist()  # many of the same length
        assert balance(lengths, slots) == one_by_one(lengths, slots)


class Counted(int):
    """A length that counts how often lengths are compared or added up."""

    operations = 0

    def __lt__(self, other: object) -> bool:
        Counted.operations += 1
        return int(self) < int(other)  # type: ignore[call-overload]

    def __neg__(self) -> "Counted":
        return Counted(-int(self))

    def __radd__(self, other: int) -> "Counted":
        Counted.operations += 1
        return Counted(int(self) + other)

    __add__ = __radd__


def test_sharing_out_takes_about_as_many_operations_as_sorting():
    rows, slots = 4096, 512
    lengths = [Counted(value) for value in np.random.default_rng(0).integers(20, 400, rows).tolist()]
    balance(lengths, slots)
    assert 0 < Counted.operations < 4 * rows * np.log2(rows)


def test_an_order_is_the_one_that_earlier_versions_drew():
    """Rows as they were drawn before orders were arrays: a run that was begun then goes on with the same rows."""
    assert [row for _, row in Order([10], [1.0], batch_size=4, seed=3).step(5)] == FROM_BEFORE["one"]
    mixed = Order([30, 10, 7], [0.2, 0.5, 0.3], batch_size=5, seed=42)
    assert [mixed.step(step) for step in (1, 10, 11, 23)] == FROM_BEFORE["mixed"]


FROM_BEFORE: dict[str, Any] = {
    "one": [2, 0, 7, 4],
    "mixed": [
        [(2, 1), (1, 1), (1, 0), (1, 6), (1, 4)],
        [(1, 5), (0, 11)],
        [(0, 25), (2, 2), (0, 9), (1, 3), (1, 0)],
        [(1, 5), (0, 5), (0, 6), (1, 3), (1, 2)],
    ],
}


def test_groups_that_are_opened_late_are_laid_out_alike():
    draw = np.random.default_rng(0)
    ids = [[draw.integers(1, 99, n).tolist() for n in draw.integers(2, 20, 12)] for _ in range(2)]
    sets = [token_set([Encoded(row, [n > 0 for n in range(len(row))]) for row in rows]) for rows in ids]
    picked = [(0, 3), (1, 7), (1, 2), (0, 0), (0, 11), (1, 5)]
    late, early = drawn(sets, picked), [sets[source].group(row) for source, row in picked]
    for rank in range(2):
        layout = {"rank": rank, "world_size": 2, "accumulation": 2, "packing": True, "device": CPU}
        for one, other in zip(split_batch(late, **layout), split_batch(early, **layout), strict=True):
            assert (one.rows, one.chunks, one.tokens) == (other.rows, other.chunks, other.tokens)
            assert one.input_ids.equal(other.input_ids)


def test_ranks_of_a_node_map_one_permutation(tmp_path: Path):
    first, second = (Order([1000, 50], [3, 1], batch_size=8, seed=1, arrays=NodeArrays(tmp_path, 1)) for _ in range(2))
    alone = Order([1000, 50], [3, 1], batch_size=8, seed=1)
    for step in (1, 2, alone.steps_per_epoch, alone.steps_per_epoch + 1, 5 * alone.steps_per_epoch):
        assert first.step(step) == second.step(step) == alone.step(step)
        sizes = sum(file.stat().st_size for file in tmp_path.iterdir())
        assert sizes <= 2 * (1050 + 2 * 1000 + 2 * 50), "old epochs are deleted"
    assert not list(tmp_path.glob(".*")), "nothing half-made is left"


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_together_train_every_token_once(packing: bool):
    draw = np.random.default_rng(0)
    rows = [(draw.integers(1, 99, n).astype(np.int32), np.ones(n, dtype=bool)) for n in (9, 4, 7, 3, 1)]
    micros = [
        micro
        for rank in range(2)
        for micro in split_batch(singles(rows), rank=rank, world_size=2, accumulation=3, packing=packing, device=CPU)
    ]
    assert len(micros) == 6
    targets = torch.cat([micro.targets_N for micro in micros]).tolist()
    assert sorted(targets) == sorted(int(token) for ids, _ in rows for token in ids[1:])
    for micro in micros:
        flat = micro.input_ids.flatten()
        assert torch.equal(flat[micro.positions_N + 1], micro.targets_N)
        assert torch.equal(
            micro.position_ids.flatten()[micro.positions_N + 1] > 0, torch.ones(len(micro.targets_N), dtype=bool)
        )


def test_ranks_agree_on_the_calls_of_the_head():
    long, short = np.ones(2500, dtype=np.int32), np.ones(3, dtype=np.int32)
    rows = [(long, np.ones(2500, dtype=bool)), (short, np.ones(3, dtype=bool))]
    chunks = [
        split_batch(singles(rows), rank=rank, world_size=2, accumulation=1, packing=True, device=CPU)[0].chunks
        for rank in (0, 1)
    ]
    assert chunks == [3, 3]


def test_segments_scatter_undoes_the_grouping():
    lengths = [3, 50, 4, 48, 1]
    segments = Segments.of(lengths, CPU)
    values = torch.arange(sum(lengths))
    laid = torch.cat([values[block.queries].flatten() for block in segments.blocks().blocks])
    assert torch.equal(laid[segments.blocks().scatter_T], values)
    assert laid.numel() < 5 * 50
