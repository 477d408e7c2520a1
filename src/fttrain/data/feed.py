"""A stage's micro-batches: those of optimizer step s for this rank, and those of an evaluation."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.stages import Pairwise, Sft
from ftlaunch.rows import unfit
from ftlaunch.run.records import Counts
from ftlaunch.run.spec import StageSpec
from fttrain.data import tokens
from fttrain.data.batches import Layout, MicroBatch, split_batch
from fttrain.data.drawn import all_of, drawn
from fttrain.data.held_out import on_both_sides
from fttrain.data.limits import Limits
from fttrain.data.node_arrays import NodeArrays
from fttrain.data.order import Order
from fttrain.data.prepare import prepare
from fttrain.data.token_set import Group, PairSet
from fttrain.distributed.world import World

log = logging.getLogger(__name__)

SEARCHED = 200_000
"""Most rows of a data set that are searched for prompts of rows held out."""
STATE_BYTES = 4096
"""A stream's position takes a multiple of so many."""
LENGTH_PARTS = 32
"""Bars of a histogram of lengths."""
EXCERPT = 60
"""Characters of a row's text that name it."""
InTurn = Callable[[Sequence[Group]], Iterator[tuple[list[int], MicroBatch]]]
Ask = Callable[[str, Sequence[Group], InTurn], np.ndarray]
"""(key of the groups, the groups, how this rank walks through its part of them) → [groups, 2] float32."""


class Feed(Protocol):
    """The data that the loop trains and evaluates on."""

    num_steps: int

    def step(self, number: int) -> list[MicroBatch]:
        """This rank's micro-batches of optimizer step `number`; numbers come in order, from any first one."""
        ...

    def names(self, number: int, rows: Sequence[int]) -> list[str]:
        """Return names for people, such as "facts.jsonl:17", of some rows or pairs of optimizer step `number`."""
        ...

    def epoch_at(self, number: int) -> float | None:
        """Epochs done after step `number`; None where data has no known end."""
        ...

    def evaluation(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches of the rows held out; as many on every rank, none if no row is held out."""
        ...

    def counts(self) -> list[Counts]:
        """What became of the rows of each data set."""
        ...


def build(
    spec: StageSpec,
    stage: Sft | Pairwise,
    tokenizer: Any,
    world: World,
    asked: Callable[[], str | None] = lambda: None,
    progress: Path | None = None,
) -> "TableFeed | StreamFeed":
    """The feed of a stage. Collective; `asked` and `progress` as `prepare` has them, which may raise Stopped."""
    datas = list(spec.data.values())
    if any(data.streaming for data in datas):
        if not all(data.streaming for data in datas):
            raise UserError("streaming and other data sets are mixed", "set `streaming` for all of a stage's data sets")
        return StreamFeed(spec, stage, datas, tokenizer, world)
    cache, arrays = tokens.cache_root(), NodeArrays.of_attempt()
    keys = prepare(datas, tokenizer, cache, world, asked, progress)
    tokenized = [tokens.opened(key, data, spec.seed, cache, arrays) for key, data in zip(keys, datas, strict=True)]
    if world.is_main:
        for name, one in zip(spec.data, tokenized, strict=True):
            report(name, one.counts)
            report_shared(name, one)
    return TableFeed(spec, stage, datas, tokenized, tokenizer, world)


def report(name: str, counts: Counts) -> None:
    """Tell the log which rows of a data set are left out, and what others lose."""
    dropped = {**counts.unfit, **counts.excused}
    if counts.dropped_untrained:
        dropped["no token to train"] = counts.dropped_untrained
    if dropped:
        log.warning("data.%s: %s", name, unfit.summary(counts.rows, dropped, counts.examples))
    if counts.control:
        log.warning("data.%s: %d rows hold control tokens, encoded as text", name, counts.control)
    if counts.respaced:
        message = "data.%s: the chat template changes white space, such as indentation, in answers of %d rows; first %s"
        log.warning(message, name, counts.respaced, counts.first_respaced)
    if counts.lost:
        log.warning("data.%s: %d rows lose %d tokens at max_length", name, counts.truncated, counts.lost)


def report_shared(name: str, tokenized: tokens.Tokenized) -> None:
    """Tell the log where rows that are held out have prompts that are trained on, too."""
    if len(tokenized.train) > SEARCHED or not len(tokenized.test):
        return
    shared = on_both_sides(tokenized.train, tokenized.test)
    if shared:
        message = (
            'data.%s: %d of the %d rows held out have a prompt that is trained on, too: test_by = "prompt" parts them'
        )
        log.warning(message, name, shared, len(tokenized.test))


class _RowFeed:
    """Rows that exist before the model is built: how they are divided among ranks and laid out in memory."""

    def __init__(self, spec: StageSpec, stage: Sft | Pairwise, world: World) -> None:
        self._micro = spec.micro_batch_size
        self._accumulation = spec.accumulation
        self._layout = Layout(stage.packing, isinstance(stage, Pairwise) and stage.share_prompt)
        """The recipe's layout, until the model has been tried with it."""
        self._world = world

    def lay(self, layout: Layout) -> None:
        """Use this layout of rows from now on."""
        self._layout = layout

    def _split(self, groups: Sequence[Group], accumulation: int | None = None) -> list[MicroBatch]:
        return split_batch(
            groups,
            rank=self._world.rank,
            world_size=self._world.size,
            accumulation=accumulation or self._accumulation,
            packing=self._layout.packing,
            share=self._layout.share,
            device=self._world.device,
        )

    def _in_turn(self, groups: Sequence[Group]) -> Iterator[tuple[list[int], MicroBatch]]:
        """Groups in micro-batches of the training size, with their places, in rounds in which every rank has one."""
        width = self._micro * self._world.size
        # A round is as wide as all ranks together, so that each rank has a micro-batch in each: passes are collective.
        for start in range(0, len(groups), width):
            for micro in self._split(groups[start : start + width], accumulation=1):
                yield [start + row for row in micro.rows], micro

    def _evaluated(self, groups: Sequence[Group]) -> Iterator[MicroBatch]:
        """`_in_turn`, with the places of the groups as the numbers of their rows."""
        return (replace(micro, rows=tuple(places)) for places, micro in self._in_turn(groups))


class TableFeed(_RowFeed):
    """Rows that are all tokenized before training."""

    def __init__(
        self,
        spec: StageSpec,
        stage: Sft | Pairwise,
        datas: Sequence[Data],
        tokenized: Sequence[tokens.Tokenized],
        tokenizer: Any,
        world: World,
    ) -> None:
        super().__init__(spec, stage, world)
        self._train = [one.train for one in tokenized]
        self._test = [one.test for one in tokenized]
        self._tokenizer = tokenizer
        self._paths = [data.path for data in datas]
        self._keys = [one.key for one in tokenized]
        self._counts = [one.counts for one in tokenized]
        weights = [data.weight for data in datas]
        sizes = [len(rows) for rows in self._train]
        arrays = NodeArrays.of_attempt()
        # The order is an array that all processes of a node share: of 10⁸ rows it takes 762 MB, which no rank holds
        # alone.
        self._order = Order(sizes, weights, batch_size=stage.batch_size, seed=spec.seed, arrays=arrays)
        self.num_steps = self._order.num_steps(epochs=stage.epochs, steps=stage.steps)

    def step(self, number: int) -> list[MicroBatch]:
        return self._split(drawn(self._train, self._order.step(number)))

    def names(self, number: int, rows: Sequence[int]) -> list[str]:
        # Drawn again rather than kept: names are asked for only when a row has broken a step.
        of_step = self._order.step(number)
        return [self._name(*of_step[row]) for row in rows]

    def _name(self, source: int, row: int) -> str:
        """The data set and how the row's trained text begins: after the split a number tells little."""
        ids_T, trained_T = self._train[source].group(row).rows[0]
        text = self._tokenizer.decode(ids_T[trained_T])
        return f"{self._paths[source]}: {text[:EXCERPT]!r}{'…' if len(text) > EXCERPT else ''}"

    def epoch_at(self, number: int) -> float:
        return self._order.epoch_at(number)

    def evaluation(self) -> Iterator[MicroBatch]:
        return self._evaluated(all_of(self._test))

    def counts(self) -> list[Counts]:
        parts = zip(self._counts, self._train, self._test, strict=True)
        return [_with_lengths(counts, np.concatenate([train.lengths, test.lengths])) for counts, train, test in parts]

    def require(self, limits: Limits, virtual: int) -> None:
        """Raise UserError where a row is more than the model can read; `virtual` tokens come before each."""
        # All ids of a large data set take seconds to read, and few tokenizers have tokens that their model has not.
        has_more = max(self._tokenizer.get_vocab().values(), default=0) >= limits.vocabulary
        for path, table in zip(self._paths * 2, [*self._train, *self._test], strict=True):
            rows = table.answers if isinstance(table, PairSet) else table
            limits.require_short(path, int(rows.lengths.max(initial=0)), virtual=virtual)
            if has_more:
                limits.require_known(path, rows.ids, self._tokenizer)

    def refer(self, ask: Ask) -> None:
        """Give every pair the log-probabilities that `ask` returns for it."""
        for name, tables in (("train", self._train), ("test", self._test)):
            for place, (table, key) in enumerate(zip(tables, self._keys, strict=True)):
                if len(table) == 0:
                    continue
                assert isinstance(table, PairSet)
                # In table order and not in training's, so that the result can be cached and taken by other runs on the
                # same rows.
                groups = drawn([table], [(0, row) for row in range(len(table))])
                references = ask(f"{key} {name}", groups, self._in_turn)
                tables[place] = replace(table, references=references)


class StreamFeed(_RowFeed):
    """Rows that are read and tokenized as training goes. Every rank reads all of them and keeps its own."""

    def __init__(
        self, spec: StageSpec, stage: Sft | Pairwise, datas: Sequence[Data], tokenizer: Any, world: World
    ) -> None:
        super().__init__(spec, stage, world)
        self._datas = datas
        self._tokenizer = tokenizer
        self._seed = spec.seed
        self._batch = stage.batch_size
        assert stage.steps is not None, "rules.py asks for steps with streaming data"
        self.num_steps = stage.steps
        self._taken = 0
        # A generator of its own: which data set is next must not depend on how many rows were shuffled in between.
        self._draws = np.random.Generator(np.random.PCG64([self._seed, 0]))
        """Which data set the next row is from."""
        self._epochs = [0 for _ in datas]
        self._yielded = [0 for _ in datas]
        """Rows that each data set's newest row has given so far."""
        self._held_out: list[Group] | None = None
        self._tallies = [tokens.Tally() for _ in datas]
        """Tallies of each data set's newest pass."""
        self._rows = self._mixture()
        self._limits: Limits | None = None

    def step(self, number: int) -> list[MicroBatch]:
        start = (number - 1) * self._batch
        for _ in islice(self._rows, start - self._taken):  # rows of a resumed run that no checkpoint says were passed
            pass
        rows = list(islice(self._rows, self._batch))
        self._taken = start + len(rows)
        if self._limits is not None:
            for name, row in zip(self.names(number, range(len(rows))), rows, strict=True):
                self._limits.require_known(name, row.rows[0][0], self._tokenizer)
        return self._split(rows)

    def names(self, number: int, rows: Sequence[int]) -> list[str]:
        return [f"row {(number - 1) * self._batch + row + 1} of the stream" for row in rows]

    def epoch_at(self, number: int) -> None:  # noqa: ARG002 the protocol's
        return None

    def evaluation(self) -> Iterator[MicroBatch]:
        if self._held_out is None:
            tables = [tokens.stream_test(data, self._tokenizer) for data in self._datas if data.test or data.eval]
            self._held_out = [table.group(row) for table in tables for row in range(len(table))]
        return self._evaluated(self._held_out)

    def counts(self) -> list[Counts]:
        return [tally.counts() for tally in self._tallies]

    def require(self, limits: Limits, virtual: int) -> None:
        """Refuse rows that could be too long; a token that the model does not know is found once its row is read."""
        self._limits = limits
        for data in self._datas:
            limits.require_short(f"{data.path}, up to max_length", data.max_length, virtual=virtual)

    def state_dict(self) -> dict[str, Tensor]:
        """Where the stream is, so that a resumed run need not encode what it has passed."""
        sources = [
            {"epoch": epoch, "yielded": yielded, "tally": tally.as_plain()}
            for epoch, yielded, tally in zip(self._epochs, self._yielded, self._tallies, strict=True)
        ]
        state = {"taken": self._taken, "draws": self._draws.bit_generator.state, "sources": sources}
        text = json.dumps(state).encode()
        padded = text.ljust(-(-len(text) // STATE_BYTES) * STATE_BYTES)  # so that a checkpoint's layout stays the same
        return {"position": torch.frombuffer(bytearray(padded), dtype=torch.uint8)}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Go on where the stream was; from its beginning where an earlier version did not say where."""
        if not tensors:
            return
        state = json.loads(bytes(tensors["position"].tolist()))
        self._taken, self._draws.bit_generator.state = state["taken"], state["draws"]
        self._epochs = [source["epoch"] for source in state["sources"]]
        self._yielded = [source["yielded"] for source in state["sources"]]
        self._tallies = [tokens.Tally.from_plain(source["tally"]) for source in state["sources"]]
        self._rows = self._mixture()

    def _mixture(self) -> Iterator[Group]:
        """Rows drawn by weight, for ever."""
        weights = np.array([data.weight for data in self._datas])
        sources = [self._endless(place, data) for place, data in enumerate(self._datas)]
        while True:
            yield next(sources[int(self._draws.choice(len(sources), p=weights / weights.sum()))])

    def _endless(self, place: int, data: Data) -> Iterator[Group]:
        while True:
            tally = self._tallies[place]
            at, empty = tally.rows, tally.rows == 0
            # Each pass has an order of its own, which a resumed run finds again from the number of the pass alone.
            seed = self._seed + self._epochs[place]
            for row in tokens.stream(data, self._tokenizer, seed, tally, self._yielded[place]):
                self._yielded[place] = self._yielded[place] + 1 if tally.rows == at else 1
                at, empty = tally.rows, False
                yield Group(((np.array(row.ids_T, dtype=np.int32), np.array(row.trained_T, dtype=bool)),))
            if empty:
                raise UserError(f"{data.path} yields no row that can be trained on", "see `ftlaunch preview`")
            self._epochs[place] += 1
            self._tallies[place], self._yielded[place] = tokens.Tally(), 0


def _with_lengths(counts: Counts, lengths_N: np.ndarray) -> Counts:
    """Return the counts with a histogram of the rows' lengths."""
    longest = int(lengths_N.max())
    found, _ = np.histogram(lengths_N, bins=min(LENGTH_PARTS, longest), range=(0, longest))
    return msgspec.structs.replace(counts, longest=longest, lengths=found.tolist())


def mean_perplexity(loss: float) -> float:
    """Return exp of a mean loss in nats per token; infinity where it would overflow."""
    return math.exp(loss) if loss < 700 else math.inf
