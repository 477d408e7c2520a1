"""Which shard of a checkpoint holds which elements, so that a rank opens those that it needs and no others.

Standard library only: the process that writes checkpoints makes the index.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

FILE = "pieces.json"
METADATA = "pieces"
"""The key under which a shard's header says the same of the shard alone: {piece: [offset, length]}."""

Part = tuple[int, int, int]
"""(rank whose shard it is, first element, number of elements)."""


@dataclass(frozen=True)
class Index:
    """Tensors that are cut in the same way share one list of parts, so it is small for any number of ranks."""

    splits: Sequence[Sequence[Part]]
    """Parts by their first element; together they are the whole tensor."""
    pieces: Mapping[str, int]
    """Key of a piece → its place in `splits`."""

    def parts(self, key: str, start: int, end: int) -> Iterator[Part]:
        """The parts of a flattened tensor that hold any of its elements from `start` to `end`."""
        split = self.splits[self.pieces[key]] if key in self.pieces else ()
        # Parts come in order: the last one that begins at or before `start` is the first that may hold it.
        first = bisect_right(split, start, key=lambda part: part[1]) - 1
        yield from takewhile(lambda part: part[1] < end, islice(split, max(first, 0), None))

    def render(self) -> bytes:
        return json.dumps({"splits": self.splits, "pieces": self.pieces}, separators=(",", ":")).encode()


def index_of(shards: Iterable[Mapping[str, Sequence[int]]]) -> Index:
    """Return the index of shards, given what each rank's header says of it, in order of rank."""
    # Thousands of tensors are cut in a few ways. So parts are kept as a tree of prefixes: a key remembers only the
    # last of its parts, each part the one before it, and keys that were cut alike end at the same node.
    parts: list[tuple[int, Part]] = []
    """(place of the part before it or -1, part): keys with the same parts so far have the same last one."""
    last: dict[str, int] = {}
    for rank, pieces in enumerate(shards):
        made: dict[tuple[int, int, int], int] = {}
        for key, (offset, length) in pieces.items():
            before = last.get(key, -1)
            if (before, offset, length) not in made:
                made[before, offset, length] = len(parts)
                parts.append((before, (rank, offset, length)))
            last[key] = made[before, offset, length]
    ends = {place: number for number, place in enumerate(dict.fromkeys(last.values()))}
    return Index([_back_from(place, parts) for place in ends], {key: ends[place] for key, place in last.items()})


def _back_from(place: int, parts: Sequence[tuple[int, Part]]) -> list[Part]:
    found: list[Part] = []
    while place >= 0:
        place, part = parts[place]
        found.append(part)
    return sorted(found, key=lambda part: part[1])


def read(folder: Path) -> Index | None:
    """The index of a checkpoint; None where an earlier version wrote it without one."""
    try:
        content = json.loads((folder / FILE).read_bytes())
    except FileNotFoundError:
        return None
    return Index(content["splits"], content["pieces"])


def of_shard(path: Path) -> dict[str, list[int]]:
    """Return what a shard's header says of its pieces: {key: [offset, length]}."""
    with path.open("rb") as file:
        # safetensors: eight bytes of header length, little-endian, and the header as JSON.
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"][METADATA])
