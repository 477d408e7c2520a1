"""Sharded checkpoints: every rank writes its pieces, and only what verifies against the manifest counts.

    step-00000100/
      rank0.safetensors  pieces of weights and moments, random states       one a rank, written at the same time
      rank0.json         which elements of which tensor the pieces are
      manifest.json      optimizer step, world size, SHA-256 and size of every file; written last

A checkpoint is made under a temporary name, flushed, and renamed.
"""

import hashlib
import json
import logging
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ftlaunch.errors import UserError
from ftlaunch.rundir import Step, sync_folder, write_json
from fttrain import shards
from fttrain.engine import Engine

FORMAT = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint says besides weights and moments."""

    step: int
    state: dict[str, Any]
    """What the loop gave to `save`: counters, best evaluation."""


class Checkpoints:
    """The checkpoints of one step folder. Every method is called by all ranks together."""

    def __init__(self, folder: Path, spec: Step, engine: Engine) -> None:
        self._folder = folder
        self._spec = spec
        self._engine = engine
        self._world = engine.world
        self._good: set[int] = set()
        """Steps of the checkpoints that rank 0 has verified."""

    def save(self, step: int, state: dict[str, Any], *, keep: int, best: int | None) -> None:
        """Write a checkpoint, verify it, then delete all behind the `keep` newest good ones but that of step `best`.

        Raises on all ranks, with every rank's cause, if any rank fails; nothing half-written is left under a real name.
        """
        final = self._folder / _name(step)
        aside = self._folder / f".{final.name}.partial"
        try:
            self._agree(lambda: self._start(aside), on_main=True)
            files = self._agree(lambda: self._write_shard(aside))
            self._agree(lambda: self._commit(aside, final, step, state, files), on_main=True)
        except UserError:
            if self._world.is_main:  # on a full disk it would be in the way
                shutil.rmtree(aside, ignore_errors=True)
            raise
        self._agree(lambda: self._prune(keep, best), on_main=True)

    def load(self) -> Loaded | None:
        """Restore the newest checkpoint that verifies; None if there is none. Bad ones are named and passed over.

        Raises UserError if all that exist are bad, or if it belongs to another recipe or world size.
        """
        chosen, problems = self._world.from_main(self._newest() if self._world.is_main else (None, []))
        if chosen is None and problems:
            raise UserError(
                f"no checkpoint in {self._folder} is good: {'; '.join(problems)}",
                "mend the disk or restore the folder from a copy; remove it to train from the start",
            )
        if chosen is None:
            return None
        folder = self._folder / chosen
        manifest = json.loads((folder / "manifest.json").read_text())
        self._refuse_foreign(manifest, folder)
        self._agree(lambda: self._read(folder, manifest))
        shards.adopt(self._engine, manifest["step"])
        self._engine.set_loss_scale(manifest["loss_scale"])
        return Loaded(manifest["step"], manifest["state"])

    def _agree(self, act: Any, *, on_main: bool = False) -> Any:
        """Run `act` on every rank (or on rank 0), learn of every rank's failure, and fail together or not at all."""
        result, failure = None, None
        if self._world.is_main or not on_main:
            try:
                result = act()
            except (OSError, SafetensorError) as error:
                failure = f"rank {self._world.rank}: {error}"
        failures = [text for text in self._world.gather(failure) if text]
        if failures:
            raise UserError(
                f"a checkpoint could not be written or read: {'; '.join(failures)}",
                "the checkpoints before it are untouched; make room or mend the disk, then `ftlaunch resume`",
            )
        return self._world.gather(result) if not on_main else result

    def _start(self, aside: Path) -> None:
        for leftover in self._folder.glob(".step-*.partial"):  # of saves that a crash cut short
            shutil.rmtree(leftover)
        aside.mkdir(parents=True, mode=0o700)

    def _write_shard(self, aside: Path) -> dict[str, dict[str, Any]]:
        """Write this rank's two files; returns their sizes and digests."""
        own = shards.owned(self._engine)
        tensors = {piece.key: piece.tensor.cpu() for piece in own}
        tensors |= {f"rng|{name}": state for name, state in _random_states().items()}
        rank = self._world.rank
        weights, index = aside / f"rank{rank}.safetensors", aside / f"rank{rank}.json"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights)
        index.write_text(json.dumps({piece.key: [piece.offset, len(piece)] for piece in own}))
        return {path.name: _seal(path) for path in (weights, index)}

    def _commit(self, aside: Path, final: Path, step: int, state: dict[str, Any], files: list[dict[str, Any]]) -> None:
        manifest = {
            "format": FORMAT,
            "step": step,
            "world_size": self._world.size,
            "strategy": self._spec.parallel.strategy,
            "recipe_hash": self._spec.recipe_hash,
            "state": state,
            "loss_scale": self._engine.loss_scale(),
            "files": {name: seal for of_rank in files for name, seal in of_rank.items()},
        }
        manifest["sha256"] = _digest(manifest)
        write_json(aside / "manifest.json", manifest)
        problem = verify(aside)
        if problem:
            raise OSError(f"what was written does not read back: {problem}")
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        sync_folder(self._folder)
        self._good.add(step)

    def _prune(self, keep: int, best: int | None) -> None:
        steps = sorted((_step_of(path) for path in self._folder.glob("step-*")), reverse=True)
        good = 0
        for step in steps:
            if good < keep:
                good += self._problem(step) is None
            elif step != best:
                shutil.rmtree(self._folder / _name(step))

    def _newest(self) -> tuple[str | None, list[str]]:
        """Name of the newest checkpoint that verifies, if any, and what is wrong with those after it."""
        problems: list[str] = []
        for path in sorted(self._folder.glob("step-*"), key=_step_of, reverse=True):
            problem = self._problem(_step_of(path))
            if problem is None:
                return path.name, problems
            log.warning("checkpoint %s is passed over: %s", path.name, problem)
            problems.append(f"{path.name}: {problem}")
        return None, problems

    def _problem(self, step: int) -> str | None:
        """`verify` of the checkpoint of a step, which reads a good one once only."""
        problem = None if step in self._good else verify(self._folder / _name(step))
        if problem is None:
            self._good.add(step)
        return problem

    def _refuse_foreign(self, manifest: dict[str, Any], folder: Path) -> None:
        if manifest["recipe_hash"] != self._spec.recipe_hash:
            raise UserError(f"{folder} was written by another recipe", "resume the run that it belongs to")
        if manifest["world_size"] != self._world.size:
            raise UserError(
                f"{folder} was written by {manifest['world_size']} processes, and there are {self._world.size} now",
                "resume with the same number of processes",
            )

    def _read(self, folder: Path, manifest: dict[str, Any]) -> None:
        indices = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(manifest["world_size"])]
        files = [safe_open(folder / f"rank{rank}.safetensors", "pt") for rank in range(manifest["world_size"])]
        for piece in shards.held(self._engine):
            _fill(piece, indices, files)
        own = files[self._world.rank]
        _restore_random_states({key[4:]: own.get_tensor(key) for key in own.keys() if key.startswith("rng|")})  # noqa: SIM118


def _fill(piece: shards.Piece, indices: list[dict[str, list[int]]], files: list[Any]) -> None:
    """Copy into a live piece whatever parts of it the files hold."""
    filled = 0
    for index, file in zip(indices, files, strict=True):
        offset, length = index.get(piece.key, (0, 0))
        start, end = max(piece.offset, offset), min(piece.offset + len(piece), offset + length)
        if start >= end:
            continue
        stored = file.get_slice(piece.key)[start - offset : end - offset]
        piece.tensor[start - piece.offset : end - piece.offset].copy_(stored)
        filled += end - start
    assert filled == len(piece), f"{piece.key}: {filled} of {len(piece)} elements are in the checkpoint"


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None: manifest present, every file there, of its size and digest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']} is not {FORMAT}"
        if manifest.pop("sha256") != _digest(manifest):
            return "manifest.json does not match its own SHA-256"
        for name, seal in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != seal["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, the manifest says {seal['bytes']}"
            if _sha256(path) != seal["sha256"]:
                return f"{name} does not match its SHA-256"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read: {error}"
    return None


def _digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own digest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _seal(path: Path) -> dict[str, Any]:
    """Flush a file to disk; returns its size and digest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _random_states() -> dict[str, Tensor]:
    """States of every generator that training may draw from, as byte or word tensors."""
    _, keys, position, *_ = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
        "numpy": torch.tensor([*keys.tolist(), position], dtype=torch.int64),  # type: ignore[union-attr]
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate((3, tuple(states["python"].tolist()), None))
    *keys, position = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, 0, 0.0))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
