"""Data sets as tokens: made once, kept on disk, and split into rows to train on and rows held out."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ftlaunch.errors import UserError
from ftlaunch.recipe import Data
from ftlaunch.rows.fill import Row
from fttrain.data.chat import Encoded, Encoder
from fttrain.data.sources import fingerprint, load_rows, stream_rows
from fttrain.data.token_set import Counts, TokenSet, open_set, supervised, token_set, write_set

VERSION = 1
"""Of the files in the cache and of what is written there: raise it when `chat` encodes a row differently."""
BATCH = 512
"""Rows tokenized together."""
STREAM_BATCH = 64
JUDGED_ROWS = 1000
"""Rows of a stream after which it is judged; one that is shorter is judged at its end."""

_NOT_IN_ROWS = ("path", "config", "split", "revision", "template", "test", "weight", "streaming")
"""Fields of `Data` that the fingerprint or the template's text stands for, or that change no row's tokens."""


@dataclass(frozen=True)
class Tokenized:
    """A data set, ready to train on. `counts` is over both parts."""

    train: TokenSet
    test: TokenSet
    counts: Counts


def cache_root() -> Path:
    """Where token sets are kept unless one says otherwise: ~/.cache/ftlaunch/tokens."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ftlaunch" / "tokens"


def tokenize(data: Data, tokenizer: Any, seed: int, cache: Path) -> Tokenized:
    """The data set as tokens, from the cache where the same rows were made with the same tokenizer before.

    `data.test` rows are drawn with the seed. Raises UserError where rows cannot be read or encoded, where none or
    nothing trained is left, where no answer's end is trained, and where the test takes all rows.
    """
    encoder = Encoder(tokenizer, data)
    folder = cache / _key(data, tokenizer, encoder)
    everything, counts = open_set(folder) or _make(folder, data, encoder)
    train, test = _split(everything, data, seed)
    return Tokenized(train, test, counts)


def stream(data: Data, tokenizer: Any, seed: int) -> Iterator[Encoded]:
    """One pass over the data in a seeded order, encoded as it goes; the first `data.test` rows are not among them.

    Raises UserError as `tokenize` does, what holds for the whole set after 1000 rows or at the end.
    """
    encoder, tally, judged = Encoder(tokenizer, data), _Tally(), False
    for encoded in _encoded(stream_rows(data, seed, _held_out(data)), encoder, STREAM_BATCH):
        kept = tally.count(encoded, encoder)
        if kept is not None:
            yield kept
        if not judged and tally.rows == JUDGED_ROWS:
            tally.judge(data)
            judged = True
    if not judged:
        tally.judge(data)


def stream_test(data: Data, tokenizer: Any) -> TokenSet:
    """The first `data.test` rows of a stream, in memory."""
    encoder, tally = Encoder(tokenizer, data), _Tally()
    rows = islice(load_rows(data), _held_out(data))
    counted = (tally.count(encoded, encoder) for encoded in _encoded(rows, encoder, STREAM_BATCH))
    return token_set([kept for kept in counted if kept is not None])


def _held_out(data: Data) -> int:
    assert isinstance(data.test, int), "the test of streamed data is a count"
    return data.test


def _make(folder: Path, data: Data, encoder: Encoder) -> tuple[TokenSet, Counts]:
    """Read and encode all rows, and keep the set in `folder`."""
    tally = _Tally()
    encoded = (tally.count(row, encoder) for row in _encoded(load_rows(data), encoder, BATCH))

    def judged() -> Counts:
        tally.judge(data)
        return tally.counts()

    return write_set(folder, (row for row in encoded if row is not None), judged)


def _encoded(rows: Iterator[tuple[str, Row]], encoder: Encoder, size: int) -> Iterator[Encoded | None]:
    while batch := list(islice(rows, size)):
        yield from encoder.encode_many(batch)


def _split(rows: TokenSet, data: Data, seed: int) -> tuple[TokenSet, TokenSet]:
    """(train, in the data's own order; test, as drawn)."""
    size = data.test if isinstance(data.test, int) else max(1, round(data.test * len(rows)))
    if size >= len(rows):
        message = f"{data.path}: test = {data.test} takes all of the {len(rows)} rows and leaves none to train on"
        raise UserError(message, "hold out fewer rows")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(rows))
    return rows.take(np.sort(order[size:])), rows.take(order[:size])


class _Tally:
    """Counts rows as they come, and judges what is left of them."""

    def __init__(self) -> None:
        self.rows = self.tokens = self.trained = self.truncated = 0
        self.kept = self.overlong = self.untrained = self.whole = 0
        self.ended = False

    def count(self, encoded: Encoded | None, encoder: Encoder) -> Encoded | None:
        """The row, if it is one to train on."""
        self.rows += 1
        if encoded is None:
            self.overlong += 1
            return None
        trained = supervised(encoded)
        self.truncated += encoded.truncated
        if trained == 0:
            self.untrained += 1
            return None
        self.kept += 1
        self.tokens += len(encoded.ids_T)
        self.trained += trained
        self.whole += not encoded.truncated
        self.ended = self.ended or (not encoded.truncated and encoder.is_ended(encoded))
        return encoded

    def counts(self) -> Counts:
        return Counts(
            rows=self.rows,
            kept=self.kept,
            tokens=self.tokens,
            trained=self.trained,
            truncated=self.truncated,
            dropped_overlong=self.overlong,
            dropped_untrained=self.untrained,
        )

    def judge(self, data: Data) -> None:
        """Raise UserError where training would be in vain."""
        if self.kept == 0:
            message = f"{data.path}: none of the {self.rows} rows is left to train on"
            reasons = f"{self.overlong} are longer than max_length, {self.untrained} have no trained token"
            raise UserError(f"{message} ({reasons})", f"raise max_length (now {data.max_length}) or mend the rows")
        if self.whole and not self.ended:
            remedy = 'use a template that ends answers with a special token, or template = "llama2" or "none"'
            raise UserError(f"{data.path}: the end of an answer is never trained: the model would not stop", remedy)


def _key(data: Data, tokenizer: Any, encoder: Encoder) -> str:
    """SHA-256 of all that the tokens depend on."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.update(padding=None, truncation=None)  # left behind by whoever called the tokenizer last
    fields = {key: value for key, value in msgspec.to_builtins(data).items() if key not in _NOT_IN_ROWS}
    made_of = [VERSION, fingerprint(data), fields, encoder.template, backend, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()
