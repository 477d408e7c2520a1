"""Sharded checkpoints: every rank saves its pieces, and only what verifies against the manifest counts.

    step-00000100/
      rank0.safetensors  pieces of weights and moments, random states; which elements they are, in the header;
                         in rank 0's also the further state of the stage
      pieces.json        which shard holds which elements
      manifest.json      optimizer step, world size, SHA-256 and size of every file; written last

Any number of ranks under any strategy can read it: a rank takes the pieces that overlap its own.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from ftlaunch.errors import UserError
from ftlaunch.recipe.stages import Training
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import SAVE_FAILURE
from ftlaunch.run.records import SaveFailure
from ftlaunch.run.spec import StageSpec
from fttrain.checkpoint import manifest, pieces, random_states, shards
from fttrain.checkpoint.shared_memory import SharedShard
from fttrain.checkpoint.writer_process import WriterProcess
from fttrain.engine import Engine

T = TypeVar("T")
POLL_SECONDS = 0.01
PATIENCE_SECONDS = 30.0
"""How long training waits for a save that is still being written when the next one is due, unless told to wait."""
RETRY_SECONDS = 10.0
RANDOM = "rng|"
CARRIED = "carried|"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """The part of a checkpoint that is neither weights nor moments."""

    step: int
    state: dict[str, Any]
    """What the loop gave to `save`: counters, best evaluation."""


@dataclass
class PendingSave:
    """A save between its copy in memory and its manifest on disk."""

    step: int
    content: dict[str, Any]
    """The manifest, but for its files."""
    keep: int
    best: int | None
    is_last: bool
    """Nothing comes after it: it is waited for, and counts."""
    committing: bool = False
    answer: dict[str, Any] | None = None
    """This rank's, until all ranks have theirs."""
    impatient: bool = False
    """Training has waited for it once, and does not again."""
    retried: bool = False
    """It has failed before, and training waits for it."""


class Checkpoints:
    """The checkpoints of one step folder. Every method is called by all ranks together."""

    def __init__(self, folder: Path, spec: StageSpec, engine: Engine, carried: Mapping[str, Stateful] = {}) -> None:
        """`carried` is what a stage needs to go on in addition to weights, moments and random states, by name.

        Its tensors are the same on every rank.
        """
        assert isinstance(spec.stage, Training)
        self._folder = folder
        self._spec = spec
        self._policy = spec.stage.on_save_failure
        self._engine = engine
        self._carried = carried
        self._world = engine.world
        self._image = SharedShard()
        self._background = WriterProcess(self._image.descriptor)
        self._flight: PendingSave | None = None
        self._good: list[str] = []
        """Checkpoints that were found good when training went on from them."""

    def save(self, step: int, state: dict[str, Any], *, keep: int, best: int | None, is_last: bool = False) -> None:
        """Copy the state of training in memory and have it written in the background; `advance` sees to the rest.

        At most one save is on its way: where the one before still is, this waits, or passes the save over by policy.
        The `keep` newest good checkpoints stay, and that of step `best`. The last save is on disk when this returns.
        Raises UserError on all ranks where a save fails that the policy does not pass over.
        """
        if not self._wait(None if is_last or self._policy != "go-on" else PATIENCE_SECONDS):
            assert self._flight is not None
            self._warn(f"step {step} is not saved: the checkpoint of step {self._flight.step} is still being written")
            return
        content = {
            "format": manifest.FORMAT,
            "step": step,
            "world_size": self._world.size,
            "strategy": self._spec.parallel.strategy,
            "training_hash": self._spec.training_hash,
            "state": state,
            "loss_scale": self._engine.loss_scale(),
        }
        self._flight = PendingSave(step, content, keep, best, is_last)
        try:
            self._copy()
            self._order_write(step)
        except OSError as error:
            # Only this rank may have failed: the others learn of it in `_advance`, and all act together there.
            self._flight.answer = {"error": str(error), "is_copied": False}
        if is_last:
            self._wait(None)
            self._background.close()

    def _copy(self) -> None:
        # Each rank has random states of its own; the stage's further state is the same everywhere, so rank 0 saves it.
        own = shards.owned(self._engine)
        tensors = {piece.key: piece.tensor for piece in own}
        tensors |= {f"{RANDOM}{name}": state for name, state in random_states.take().items()}
        for name, part in self._carried.items() if self._world.is_main else ():
            tensors |= {f"{CARRIED}{name}.{key}": tensor for key, tensor in part.state_dict().items()}
        self._image.fill(
            tensors, {pieces.METADATA: json.dumps({piece.key: [piece.offset, len(piece)] for piece in own})}
        )

    def advance(self) -> None:
        """Take a pending save one phase further once all ranks are ready for it; to be called at every step."""
        # The phases: every rank writes its shard; all learn of every shard's digest; rank 0 writes the manifest and
        # renames the folder. No phase begins before the one before it is done on all ranks.
        if self._flight is not None:
            self._advance(self._flight)
        while self._flight is not None and self._flight.retried:
            time.sleep(POLL_SECONDS)
            self._advance(self._flight)

    def _advance(self, flight: PendingSave) -> None:
        if flight.answer is None:
            waits_for_nothing = flight.committing and not self._world.is_main
            flight.answer = {} if waits_for_nothing else self._background.answer()
        if self._world.max(float(flight.answer is None)):  # a rank's writer is still at it, so nobody goes on
            return
        answers: list[Any] = self._world.gather(flight.answer)
        failures = [f"rank {rank}: {said['error']}" for rank, said in enumerate(answers) if "error" in said]
        if failures:
            is_copied = all(said.get("is_copied", True) for said in answers)
            self._failed(flight, "; ".join(failures), is_copied=is_copied)
        elif flight.committing:
            self._flight = None
            self._tell(None)
            if unpruned := answers[0]["unpruned"]:
                self._warn(f"an old checkpoint could not be deleted: {unpruned}")
        else:
            self._order_commit(flight, answers)

    def settle(self) -> None:
        """Wait for the save under way, before an end after which nothing can be saved."""
        self._wait(None)

    def _wait(self, limit: float | None) -> bool:
        """Wait until no save is pending, at most `limit` seconds; return whether none is."""
        began = time.monotonic()
        while self._flight is not None:
            self.advance()
            waited = self._world.max(time.monotonic() - began)  # by one clock, so that all ranks give up together
            if self._flight is not None and limit is not None and (self._flight.impatient or waited > limit):
                self._flight.impatient = True
                return False
            time.sleep(POLL_SECONDS if self._flight is not None else 0.0)
        return True

    def _order_write(self, step: int) -> None:
        final = str(self._folder / manifest.folder_name(step))
        self._background.order("write", folder=final, file=_file(self._world.rank), bytes=self._image.size)

    def _order_commit(self, flight: PendingSave, written: list[dict[str, Any]]) -> None:
        flight.committing, flight.answer = True, None
        if self._world.is_main:
            files = {_file(rank): shard["seal"] for rank, shard in enumerate(written)}
            self._background.order(
                "commit",
                folder=str(self._folder / manifest.folder_name(flight.step)),
                manifest=flight.content | {"files": files},
                layouts=[shard["layout"] for shard in written],
                keep=flight.keep,
                best=flight.best,
                good=self._good,
            )

    def _failed(self, flight: PendingSave, causes: str, *, is_copied: bool) -> None:
        """All ranks know that a save has failed: clear it away, and do as the policy says.

        What could not be copied cannot be tried again: by now training may have gone on.
        """
        self._flight = None
        if self._world.is_main:
            shutil.rmtree(manifest.temporary_path(self._folder / manifest.folder_name(flight.step)), ignore_errors=True)
        message = f"the checkpoint of step {flight.step} could not be written: {causes}"
        gone = self._world.from_main(not self._folder.parent.is_dir())
        tries_again = self._policy == "wait" and is_copied
        if gone or self._policy == "stop" or (flight.is_last and not tries_again):
            raise UserError(
                f"{self._folder.parent} is gone; {message}" if gone else message,
                "the checkpoints before it are untouched; make room or mend the disk, then `ftlaunch resume`",
            )
        self._warn(message)
        self._tell(SaveFailure(step=flight.step, cause=causes))
        if tries_again:
            self._warn(f"training waits: the next try is in {RETRY_SECONDS:.0f} s")
            time.sleep(RETRY_SECONDS)
            self._flight = replace(flight, committing=False, answer=None, retried=True)
            self._order_write(flight.step)

    def _tell(self, failure: SaveFailure | None) -> None:
        """Leave word for `ftlaunch status`, as far as a disk that fails takes it."""
        if self._world.is_main:
            file = self._folder.parent / SAVE_FAILURE
            with suppress(OSError):
                file.unlink(missing_ok=True) if failure is None else write_json(file, failure)

    def _warn(self, message: str) -> None:
        if self._world.is_main:
            log.warning(message)

    def load(self) -> Loaded | None:
        """Restore the newest checkpoint that verifies; None if there is none. Bad ones are named and passed over.

        Random states are restored if the same number of ranks wrote them, and seeded from seed, step and rank if not.
        Raises UserError if all that exist are bad, or if it belongs to another recipe.
        """
        self._wait(None)
        self._agree(self._clear_leftovers, on_main=True)
        folder = self._newest()
        if folder is None:
            return None
        content = manifest.read(folder)
        if content["training_hash"] != self._spec.training_hash:
            raise UserError(f"{folder} was written by another recipe", "resume the run that it belongs to")
        # Pieces are views of the live state, so reading fills the fp32 masters; weights that are computed with follow.
        self._agree(lambda: self._read(folder, content))
        shards.adopt(self._engine, content["state"]["updates"])
        self._engine.set_loss_scale(content["loss_scale"])
        return Loaded(content["step"], content["state"])

    def _clear_leftovers(self) -> None:
        for leftover in self._folder.glob(".step-*.partial"):  # of saves that a crash cut short
            shutil.rmtree(leftover)

    def _newest(self) -> Path | None:
        """The newest checkpoint in which every rank finds its share of the files good."""
        candidates = self._world.from_main([path.name for path in manifest.newest_first(self._folder)])
        problems: list[str] = []
        for name in candidates:
            # Hashing is the slow part of a resume; each rank does a share, and all hear of every rank's finding.
            found = manifest.verify(self._folder / name, share=self._world.rank, of=self._world.size)
            problem = next((problem for problem in self._world.gather(found) if problem), None)
            if problem is None:
                self._good = [name]
                return self._folder / name
            self._warn(f"checkpoint {name} is passed over: {problem}")
            problems.append(f"{name}: {problem}")
        if problems:
            raise UserError(
                f"no checkpoint in {self._folder} is good: {'; '.join(problems)}",
                "mend the disk or restore the folder from a copy; remove it to train from the start",
            )
        return None

    def _agree(self, act: Callable[[], T], *, on_main: bool = False) -> None:
        """Run `act` on every rank (or on rank 0), learn of every rank's failure, and fail together or not at all."""
        failure = None
        if self._world.is_main or not on_main:
            try:
                act()
            except (OSError, SafetensorError) as error:
                failure = f"rank {self._world.rank}: {error}"
        failures = [text for text in self._world.gather(failure) if text]
        if failures:
            remedy = "make room or mend the disk, then `ftlaunch resume`"
            raise UserError(f"a checkpoint could not be read: {'; '.join(failures)}", remedy)

    def _read(self, folder: Path, content: dict[str, Any]) -> None:
        writers = content["world_size"]
        index = pieces.read(folder) or pieces.index_of(pieces.of_shard(folder / _file(rank)) for rank in range(writers))
        _fill(shards.held(self._engine), index, folder)
        for name, part in self._carried.items():
            part.load_state_dict(_named(folder / _file(0), f"{CARRIED}{name}."))
        if writers != self._world.size:  # no rank's old state fits a rank of another world
            random_states.begin(self._spec.seed, content["step"], self._world.rank)
            return
        random_states.restore(_named(folder / _file(self._world.rank), RANDOM))


def _file(rank: int) -> str:
    return f"rank{rank}.safetensors"


def _named(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a shard whose names begin so, by what follows."""
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 it is no dict
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def _fill(held: list[shards.Piece], index: pieces.Index, folder: Path) -> None:
    """Copy the parts of live pieces from the shards that have them, one shard open at a time."""
    wanted: dict[int, list[tuple[shards.Piece, int, int]]] = {}
    for piece in held:
        filled = 0
        for rank, offset, length in index.parts(piece.key, piece.offset, piece.end):
            wanted.setdefault(rank, []).append((piece, offset, length))
            filled += min(piece.end, offset + length) - max(piece.offset, offset)
        assert filled == len(piece), f"{piece.key}: {filled} of {len(piece)} elements are in the checkpoint"
    for rank, parts in sorted(wanted.items()):
        with safe_open(folder / _file(rank), "pt") as file:
            for piece, offset, length in parts:
                start, end = max(piece.offset, offset), min(piece.end, offset + length)
                stored = file.get_slice(piece.key)[start - offset : end - offset]
                piece.tensor[start - piece.offset : end - piece.offset].copy_(stored)
