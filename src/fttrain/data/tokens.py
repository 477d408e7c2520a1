"""Data sets as tokens: made once, kept on disk, and split into rows to train on and rows held out."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.rows import for_evaluation
from ftlaunch.rows.columns import Columns
from ftlaunch.rows.conversations import is_paired, is_text
from ftlaunch.rows.template import Row, Unfit
from ftlaunch.rows.unfit import UnfitRows
from ftlaunch.run.files import cache_folder
from ftlaunch.run.records import Counts
from fttrain.data.chat import Encoded, EncodedPair, Encoder
from fttrain.data.cores import in_order
from fttrain.data.held_out import documents_of, numbered, prompts_of, whole_groups
from fttrain.data.making import Block, Making, alone, block_of
from fttrain.data.node_arrays import NodeArrays, smallest_unsigned
from fttrain.data.sources import fingerprint, load_rows, require_none, stream_rows
from fttrain.data.token_set import PairSet, TokenSet, open_set, supervised, token_set

T = TypeVar("T")
Kept = TypeVar("Kept", bound=Encoded | EncodedPair)

Made = Sequence[Encoded | EncodedPair] | Unfit
"""What a row makes, or why it makes nothing."""
Encode = Callable[[list[tuple[str, Row]]], Sequence[Made]]

Keys = tuple[str, ...]
"""Keys in the cache of a data set, and of the one that it is evaluated on, if there is one."""

VERSION = 4
"""Version of the cache's files and of their content: raise it when `chat` encodes a row differently."""
BATCH = 512
"""Rows tokenized together."""
BATCH_CHARACTERS = 1 << 20
STREAM_BATCH = 64
JUDGED_ROWS = 1000
"""Rows of a stream after which its counts are checked; a shorter stream is checked at its end."""

_NOT_IN_ROWS = (
    *("path", "config", "split", "revision", "template"),
    *("test", "weight", "streaming", "unfit", "unfit_share"),
)
"""Fields of `Data` that the fingerprint or the template's text stands for, or that change no row's tokens."""


@dataclass(frozen=True)
class Tokenized:
    """A data set, ready to train on. `counts` is over both parts."""

    train: TokenSet | PairSet
    test: TokenSet | PairSet
    counts: Counts
    key: str
    """Digest of all that rows, tokens and split depend on."""


def cache_root() -> Path:
    """Where token sets are kept unless one says otherwise: ~/.cache/ftlaunch/tokens."""
    return cache_folder("tokens")


def tokenize(
    data: Data, tokenizer: Any, seed: int, cache: Path, told: Callable[[int], None] = lambda _: None
) -> Tokenized:
    """The data set as tokens, from the cache where the same rows were made with the same tokenizer before.

    `data.test` rows are drawn with the seed. `told` is called all along with the number of rows done, and ends the
    work by raising; what is done is kept. Raises UserError where rows cannot be read or encoded, where none or nothing
    trained is left, where no answer's end is trained, and where the test takes all rows.
    """
    return opened(prepare(data, tokenizer, cache, told), data, seed, cache)


def prepare(data: Data, tokenizer: Any, cache: Path, told: Callable[[int], None]) -> Keys:
    """See to it that the cache has the data set, and the one that it is evaluated on; their keys there."""
    key = _key(data, tokenizer, Encoder(tokenizer, data))
    if open_set(cache / key) is None:
        _make(cache / key, data, tokenizer, told)
    if (evaluated := for_evaluation(data)) is not None:
        return (key, *prepare(evaluated, tokenizer, cache, told))
    return (key,)


def opened(keys: Keys, data: Data, seed: int, cache: Path, arrays: NodeArrays | None = None) -> Tokenized:
    """The data set that the cache has under these keys."""
    key, *of_evaluated = keys
    found = open_set(cache / key)
    if found is None:
        raise UserError(f"{cache / key} is gone", "leave the cache alone while a stage starts, and start it again")
    everything, counts = found
    if (evaluated := for_evaluation(data)) is not None:
        held_out = opened(tuple(of_evaluated), evaluated, seed, cache, arrays)
        return Tokenized(everything, held_out.train, counts, f"{key} {held_out.key}")
    # Parts of one document, or answers to one prompt, must not be on both sides: the test would be seen in training.
    by = "prompt" if data.test_by == "prompt" else "document" if counts.split and is_text(data) else "row"
    if by == "prompt":
        train, test = split_by(numbered(prompts_of(everything)), data, seed)
    elif by == "document":
        assert isinstance(everything, TokenSet)
        train, test = split_by(documents_of(everything), data, seed)
    else:
        train, test = split(len(everything), data, seed, arrays or NodeArrays(), key)
    by = "" if by == "row" else f" by {by}"
    return Tokenized(everything.take(train), everything.take(test), counts, f"{key} {data.test} {seed}{by}")


def stream(data: Data, tokenizer: Any, seed: int, tally: "Tally | None" = None, yielded: int = 0) -> Iterator[Encoded]:
    """One pass over the data in a seeded order, encoded as it goes; the first `data.test` rows are not among them.

    Rows are counted in `tally`. One that has counted rows already tells where the pass goes on: rows before its last
    one are read and not encoded, and that one has given `yielded` rows. Raises UserError as `tokenize` does, what holds
    for the whole set after 1000 rows or at the end.
    """
    encoder, tally = Encoder(tokenizer, data), tally or Tally()
    rows = _noted(stream_rows(data, seed, _held_out(data)), Columns(data))
    judged = tally.rows >= JUDGED_ROWS
    # A resumed pass: rows before the last counted one are read and dropped; that one is encoded again, without being
    # counted again, as the checkpoint may lie between two of the several rows that it makes.
    if tally.rows:
        rows = islice(rows, tally.rows - 1, None)
        for made in encoder.encode_many(list(islice(rows, 1))):
            yield from Tally().count(made, encoder)[yielded:]
    for made in _encoded(rows, encoder.encode_many, STREAM_BATCH):
        yield from tally.count(made, encoder)
        if not judged and tally.rows == JUDGED_ROWS:
            tally.require_rows(data)
            judged = True
    if not judged:
        tally.require_rows(data)


def stream_test(data: Data, tokenizer: Any) -> TokenSet:
    """The first `data.test` rows of a stream, or those that are there for evaluation, in memory."""
    encoder, tally = Encoder(tokenizer, data), Tally()
    evaluated = for_evaluation(data)
    rows = islice(load_rows(data), _held_out(data)) if evaluated is None else load_rows(evaluated)
    made = _encoded(rows, encoder.encode_many, STREAM_BATCH)
    return token_set([kept for one in made for kept in tally.count(one, encoder)])


def _noted(rows: Iterator[tuple[str, Row]], columns: Columns) -> Iterator[tuple[str, Row]]:
    for where, row in rows:
        columns.note(row, where)
        yield where, row


def _held_out(data: Data) -> int:
    assert isinstance(data.test, int), "the test of streamed data is a count"
    return data.test


def _make(folder: Path, data: Data, tokenizer: Any, told: Callable[[int], None]) -> None:
    """Encode all rows on all cores and keep the set in `folder`, going on from where another process left off."""
    tally, columns = Tally(), Columns(data)

    def tick() -> None:
        told(tally.rows)

    with alone(folder, tick) as partial:
        if open_set(folder) is not None:
            return
        making = Making(folder, partial)
        try:
            if making.kept is not None:
                tally = Tally.from_plain(making.kept)
            rows = islice(_ticking(_noted(load_rows(data), columns), tick), tally.rows, None)
            for block, of_block in in_order(BlockEncoder(tokenizer, data), _batches(rows, BATCH), tick):
                making.add(block)
                tally.append(of_block)
                making.keep(tally.as_plain)
            # Rows that an earlier process has encoded were read here, too: all of them are judged.
            require_none(columns.problems())
            tally.require_rows(data)
            making.publish(tally.counts())
        except UserError:
            making.discard()
            raise
        # Also a stop request or Ctrl-C: the next start goes on from what is encoded by now.
        except BaseException:
            making.keep(tally.as_plain, now=True)
            raise


class BlockEncoder:
    """Rows as a block of a set, with what became of them; it can be sent to another process."""

    def __init__(self, tokenizer: Any, data: Data) -> None:
        self._tokenizer = tokenizer
        self._data = data
        self._encoder = Encoder(tokenizer, data)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._tokenizer, self._data)

    def __call__(self, rows: list[tuple[str, Row]]) -> "tuple[Block, Tally]":
        tally = Tally()
        encode: Encode = self._encoder.encode_pairs if is_paired(self._data) else self._encoder.encode_many
        return block_of([kept for made in encode(rows) for kept in tally.count(made, self._encoder)]), tally


def _batches(rows: Iterator[T], size: int) -> Iterator[list[T]]:
    """Yield `size` rows together, or fewer if they are long, so that a batch takes about a second."""
    batch: list[T] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(repr(row))
        if len(batch) == size or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _ticking(rows: Iterator[T], tick: Callable[[], None]) -> Iterator[T]:
    """Yield the rows and call `tick` now and then: rows that are done already are skipped fast, but may be many."""
    for number, row in enumerate(rows):
        if number % BATCH == 0:
            tick()
        yield row


def _encoded(
    rows: Iterator[tuple[str, Row]], encode: Callable[[list[tuple[str, Row]]], Sequence[T]], size: int
) -> Iterator[T]:
    for batch in _batches(rows, size):
        yield from encode(batch)


def split(
    count: int, data: Data, seed: int, arrays: NodeArrays | None = None, name: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on, in the data's own order, and rows held out, as drawn. UserError where none would be left.

    `arrays` may hold them for all ranks of a node, under a name that tells the data set.
    """
    size = _size(count, data)

    def fill(rows: np.ndarray) -> None:
        rows[:] = np.arange(count, dtype=rows.dtype)
        if size:
            np.random.Generator(np.random.PCG64(seed)).shuffle(rows)
            rows[size:].sort()  # trained rows keep the data's own order, which reads a mapped file from front to back

    order = (arrays or NodeArrays()).get(f"split-{name}-{size}", 0, count, smallest_unsigned(count), fill)
    return order[size:], order[:size]


def split_by(groups_N: np.ndarray, data: Data, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`split` of rows that stay together: those of a prompt, or of a document. UserError where none would be left."""
    train, test = whole_groups(groups_N, _size(len(groups_N), data), seed)
    if not len(train):
        message = f"{data.path}: test = {data.test} takes all of the {len(groups_N)} rows, as those of a prompt or"
        raise UserError(f"{message} document stay together, and leaves none to train on", "hold out fewer rows")
    return train, test


def _size(count: int, data: Data) -> int:
    """Rows held out of so many. Raises UserError where none would be left."""
    size = data.test if isinstance(data.test, int) else max(1, round(data.test * count))
    if size >= count:
        message = f"{data.path}: test = {data.test} takes all of the {count} rows and leaves none to train on"
        raise UserError(message, "hold out fewer rows")
    return size


_COUNTS = ("rows", "kept", "tokens", "trained", "truncated", "lost", "split", "parted", "control", "respaced")
"""What a tally counts and `Counts` tells under the same name."""


class Tally:
    """Counts of a data set's rows as they are encoded, and the check of these counts."""

    def __init__(self) -> None:
        self.rows = self.tokens = self.trained = self.truncated = self.lost = self.split = self.parted = 0
        self.control = self.respaced = 0
        self.first_respaced: str | None = None
        self.kept = self.whole = self.untrained = 0
        self.ended = False
        self.unfit = UnfitRows()

    def count(self, made: Sequence[Kept] | Unfit, encoder: Encoder) -> list[Kept]:
        """The rows or pairs to train on that a row has made."""
        self.rows += 1
        if isinstance(made, Unfit):
            self.unfit.add(made)
            return []
        self.split += len(made) > 1
        kept = [one for one in made if self._counted(one, encoder)]
        self.untrained += not kept
        return kept

    def _counted(self, encoded: Encoded | EncodedPair, encoder: Encoder) -> bool:
        """Return whether there is something to train on; the row is counted in either case."""
        rows = (encoded.chosen, encoded.rejected) if isinstance(encoded, EncodedPair) else (encoded,)
        truncated = any(row.truncated for row in rows)
        self.truncated += truncated
        self.lost += sum(row.lost for row in rows)
        if not all(map(supervised, rows)):
            return False
        self.kept += 1
        self.parted += any(row.is_parted for row in rows)
        self.control += any(row.has_control for row in rows)
        places = [row.respaced_at for row in rows if row.respaced_at]
        self.respaced += bool(places)
        self.first_respaced = next((place for place in [self.first_respaced, *places] if place), None)
        self.tokens += sum(len(row.ids_T) for row in rows)
        self.trained += sum(map(supervised, rows))
        self.whole += not truncated
        self.ended = self.ended or (not truncated and all(map(encoder.is_ended, rows)))
        return True

    def append(self, later: "Tally") -> None:
        """Count rows that come after these."""
        for name in (*_COUNTS, "whole", "untrained"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.ended = self.ended or later.ended
        self.first_respaced = self.first_respaced or later.first_respaced
        self.unfit.append(later.unfit)

    def as_plain(self) -> dict[str, Any]:
        """Return the tally as plain values, for JSON."""
        return {**vars(self), "unfit": self.unfit.as_plain()}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Tally":
        """What `as_plain` gave."""
        tally = cls()
        vars(tally).update(plain, unfit=UnfitRows.from_plain(plain["unfit"]))
        return tally

    def counts(self) -> Counts:
        return Counts(
            **{name: getattr(self, name) for name in _COUNTS},
            first_respaced=self.first_respaced,
            dropped_untrained=self.untrained,
            unfit=dict(self.unfit.unfit),
            excused=dict(self.unfit.excused),
            examples=self.unfit.examples,
        )

    def require_rows(self, data: Data) -> None:
        """Raise UserError where training would be in vain, or where more rows are unfit than the recipe lets pass."""
        self.unfit.require_few(data, self.rows)
        if self.kept == 0:
            message = f"{data.path}: none of the {self.rows} rows is left to train on"
            reasons = [f"{count} × {reason}" for reason, count in self.unfit.every().items()]
            if self.untrained:
                reasons.append(f"{self.untrained} × no token to train")
            raise UserError(
                f"{message} ({', '.join(reasons)})", f"raise max_length (now {data.max_length}) or mend the rows"
            )
        if self.whole and not self.ended:
            remedy = 'use a template that ends answers with a special token, or template = "llama2" or "none"'
            raise UserError(f"{data.path}: the end of an answer is never trained: the model would not stop", remedy)


def _key(data: Data, tokenizer: Any, encoder: Encoder) -> str:
    """SHA-256 of all that the tokens depend on."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.update(padding=None, truncation=None)  # settings of the last call, which change no row
    fields = {key: value for key, value in msgspec.to_builtins(data).items() if key not in _NOT_IN_ROWS}
    # Newer than some sets, which are made as before. Those in which nothing unread was refused are not looked through.
    for key, earlier in {"control_tokens": ("refuse",), "group_by": (None,), "unread": (None, "ignore")}.items():
        if fields[key] in earlier:
            del fields[key]
    made_of = [VERSION, fingerprint(data), fields, encoder.template, backend, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()
