"""Reference log-probabilities of the answers of pairs: computed at each step, or once and cached on disk.

The reference is the policy as its stage finds it, so no second model is ever loaded.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from ftlaunch.recipe.names import is_local
from ftlaunch.run import digests
from ftlaunch.run.files import file_by_rename
from ftlaunch.run.spec import StageSpec
from fttrain import adapters, artifact
from fttrain.artifact import StartPoint
from fttrain.data.batches import MicroBatch
from fttrain.data.feed import InTurn, TableFeed
from fttrain.data.token_set import Group
from fttrain.data.tokens import cache_root
from fttrain.engine import Engine
from fttrain.preference.objective import answer_logps

VERSION = 1
"""Version of the cached files: raise it when the same model and tokens would give other numbers."""
REFERENCE = "reference"
"""Name of the frozen adapter that the policy started from. Without one the bare base is the start."""
log = logging.getLogger(__name__)


def live(engine: Engine, micro: MicroBatch) -> Tensor:
    """Return [G, 2]: log-probabilities under the frozen adapter, or with the adapter disabled, without gradient."""
    with engine.evaluating(), adapters.using_adapter(engine.scorer.model, REFERENCE):
        return answer_logps(engine.scores(micro).logps_N, micro)[0]


def precompute(feed: TableFeed, engine: Engine, origin: StartPoint, spec: StageSpec) -> None:
    """Give the feed's pairs their log-probabilities under the model as it now is, from the cache where it has them.

    Collective; rank 0 reads and writes the files.
    """
    world = engine.world
    # Rank 0 alone reads the files and tells the others: several GB would be hashed on every rank.
    start = world.from_main(_fingerprint(engine, origin, spec) if world.is_main else "")

    def ask(key: str, groups: Sequence[Group], in_turn: InTurn) -> np.ndarray:
        name = hashlib.sha256(f"{VERSION} {start} {key}".encode()).hexdigest()
        path = cache_root().with_name("references") / f"{name}.npy"
        found = world.from_main(_read(path, len(groups)) if world.is_main else None)
        if found is None:
            found = _compute(engine, groups, in_turn)
            if world.is_main:
                _write(path, found)
        return found

    feed.refer(ask)


def _compute(engine: Engine, groups: Sequence[Group], in_turn: InTurn) -> np.ndarray:
    """[groups, 2] float32, the same on every rank."""
    mine: list[tuple[list[int], list[list[float]]]] = []
    with engine.evaluating():
        for places, micro in in_turn(groups):
            mine.append((places, answer_logps(engine.scores(micro).logps_N, micro)[0].tolist()))
    # Micro-batches are balanced by length, so pairs come back out of order: each is put at its own index.
    found = np.full((len(groups), 2), np.nan, dtype=np.float32)
    for places, values in (part for parts in engine.world.gather(mine) for part in parts):
        found[places] = np.array(values, dtype=np.float32).reshape(-1, 2)
    assert not np.isnan(found).any(), "a pair has no reference"
    return found


def _fingerprint(engine: Engine, origin: StartPoint, spec: StageSpec) -> str:
    """Return all that log-probabilities depend on: the contents of the model's folder, or its hub id and commit."""
    base, commit = origin.base.path, getattr(engine.scorer.model.config, "_commit_hash", None)
    of_base = _contents(Path(base)) if is_local(base) else [base, commit]
    of_adapter = _contents(origin.adapter) if origin.adapter else None
    tables = msgspec.to_builtins([spec.adapter, artifact.replaced_activations(spec, origin)])
    held_in = [spec.model.dtype, msgspec.to_builtins(spec.model.quantization)]
    return json.dumps([of_base, of_adapter, tables, *held_in])


def _contents(folder: Path) -> list[str]:
    """Return the SHA-256 of every weight file and of the configs, by name."""
    files = sorted(path for path in folder.iterdir() if path.name.endswith((".safetensors", "config.json")))
    return [f"{path.name} {digests.sha256(path)}" for path in files]


def _read(path: Path, pairs: int) -> np.ndarray | None:
    """Return the array in a file; None where there is none, or a broken one, which is logged."""
    try:
        found = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("the cached reference log-probabilities in %s cannot be read: %s", path, error)
        return None
    return found if found.shape == (pairs, 2) else None


def _write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with file_by_rename(path) as file:
        np.save(file, values)


def precomputed(micro: MicroBatch) -> Tensor:
    """Return [G, 2]: what `precompute` found for the pairs of a micro-batch."""
    if micro.margins_G.numel() == 0:  # a slot without a pair
        return torch.zeros(0, 2, device=micro.margins_G.device)
    assert micro.references_B is not None
    return micro.references_B.view(-1, 2)
