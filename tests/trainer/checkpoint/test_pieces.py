"""The index of a checkpoint: every element is found, in no more shards than hold it, and the index stays small."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fttrain.checkpoint import pieces, store
from fttrain.checkpoint.shards import Piece, _share

WRITERS = 16
SIZES = {f"layer{number}|{slot}": (64, 40, 7)[number % 3] for number in range(30) for slot in ("weight", "exp_avg")}


def part_of(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """(offset, length) of a rank's part of a tensor, cut as ZeRO-3 does."""
    length = -(-size // ranks)
    return length * rank, max(0, min(length, size - length * rank))


def parts_of(rank: int, ranks: int) -> dict[str, list[int]]:
    cut = {key: part_of(size, rank, ranks) for key, size in SIZES.items()}
    return {key: [offset, length] for key, (offset, length) in cut.items() if length}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards in which every element's value is its place."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for rank in range(WRITERS):
        parts = parts_of(rank, WRITERS)
        tensors = {key: torch.arange(offset, offset + length).float() for key, (offset, length) in parts.items()}
        save_file(tensors, folder / f"rank{rank}.safetensors", {pieces.METADATA: json.dumps(parts)})
    return folder


@pytest.mark.parametrize("ranks", [1, 3, 8, 16, 32])
def test_a_rank_opens_only_the_shards_that_hold_its_elements(ranks: int, folder: Path, monkeypatch: pytest.MonkeyPatch):
    opened: list[str] = []

    def counting(path: Path, framework: Any) -> Any:
        opened.append(path.name)
        return safe_open(path, framework)

    index = pieces.index_of(pieces.of_shard(folder / f"rank{rank}.safetensors") for rank in range(WRITERS))
    monkeypatch.setattr(store, "safe_open", counting)
    for rank in range(ranks):
        opened.clear()
        held = [Piece(key, at, torch.full((length,), -1.0)) for key, (at, length) in parts_of(rank, ranks).items()]
        store._fill(held, index, folder)
        assert all(torch.equal(piece.tensor, torch.arange(piece.offset, piece.end).float()) for piece in held)
        needed = {
            writer
            for piece in held
            for writer in range(WRITERS)
            for offset, length in [parts_of(writer, WRITERS).get(piece.key, [0, 0])]
            if max(offset, piece.offset) < min(offset + length, piece.end)
        }
        assert sorted(opened) == sorted(f"rank{writer}.safetensors" for writer in needed)


def test_tensors_cut_alike_share_their_parts():
    index = pieces.index_of(parts_of(rank, 512) for rank in range(512))
    assert len(index.splits) == 3
    assert len(index.render()) < 10_000
    assert list(index.parts("layer0|weight", 5, 7)) == [(5, 5, 1), (6, 6, 1)]
    assert list(index.parts("unknown", 0, 9)) == []


def test_an_incomplete_checkpoint_fills_nothing(folder: Path):
    index = pieces.index_of(pieces.of_shard(folder / f"rank{rank}.safetensors") for rank in range(WRITERS - 1))
    with pytest.raises(AssertionError, match="60 of 64 elements"):
        store._fill([Piece("layer0|weight", 0, torch.zeros(64))], index, folder)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 100])
def test_ranks_that_hold_the_same_save_every_element_once(ranks: int):
    dtypes = (torch.float32, torch.uint8, torch.float32, torch.bfloat16)
    held = [Piece(f"{number}", 0, torch.zeros(5 + number, dtype=dtype)) for number, dtype in enumerate(dtypes)]
    saved: dict[str, list[int]] = {piece.key: [] for piece in held}
    for rank in range(ranks):
        of_rank = list(_share(held, rank, ranks))
        for piece in of_rank:
            saved[piece.key] += range(piece.offset, piece.end)
        assert len(of_rank) <= len(held)
    assert saved == {piece.key: list(range(len(piece))) for piece in held}
