"""Which rows make a step, who computes them, and how they lie."""

from collections import Counter

import numpy as np
import pytest
import torch

from fttrain.attention import Segments
from fttrain.data.batches import lay_out, share_out
from fttrain.data.order import Order
from fttrain.data.token_set import Group, Tokens

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
    slots = share_out(lengths, 4)
    assert sorted(row for slot in slots for row in slot) == list(range(8))
    assert all(len(slot) <= 2 for slot in slots)
    assert max(sum(lengths[row] for row in slot) for slot in slots) <= 105
    assert [len(slot) for slot in share_out([7], 3)] == [1, 0, 0]


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_together_train_every_token_once(packing: bool):
    draw = np.random.default_rng(0)
    rows = [(draw.integers(1, 99, n).astype(np.int32), np.ones(n, dtype=bool)) for n in (9, 4, 7, 3, 1)]
    micros = [
        micro
        for rank in range(2)
        for micro in lay_out(singles(rows), rank=rank, world_size=2, accumulation=3, packing=packing, device=CPU)
    ]
    assert len(micros) == 6
    targets = torch.cat([micro.targets_N for micro in micros]).tolist()
    assert sorted(targets) == sorted(int(token) for ids, _ in rows for token in ids[1:])
    for micro in micros:
        flat = micro.input_ids.flatten()
        assert torch.equal(flat[micro.places_N + 1], micro.targets_N)
        assert torch.equal(
            micro.position_ids.flatten()[micro.places_N + 1] > 0, torch.ones(len(micro.targets_N), dtype=bool)
        )


def test_ranks_agree_on_the_calls_of_the_head():
    long, short = np.ones(2500, dtype=np.int32), np.ones(3, dtype=np.int32)
    rows = [(long, np.ones(2500, dtype=bool)), (short, np.ones(3, dtype=bool))]
    chunks = [
        lay_out(singles(rows), rank=rank, world_size=2, accumulation=1, packing=True, device=CPU)[0].chunks
        for rank in (0, 1)
    ]
    assert chunks == [3, 3]


def test_segments_scatter_undoes_the_grouping():
    lengths = [3, 50, 4, 48, 1]
    segments = Segments.of(lengths, CPU)
    values = torch.arange(sum(lengths))
    laid = torch.cat([values[block.queries].flatten() for block in segments.blocks])
    assert torch.equal(laid[segments.scatter_T], values)
    assert laid.numel() < 5 * 50
