"""A training stage run in this very process: the code that a rank runs, without the seconds that starting one takes."""

import importlib
import os
import shutil
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState

from ftlaunch.recipe.adapter import Adapter, Lora
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.noise import Noise, NoNoise
from ftlaunch.recipe.stages import Optimizer, Pairwise, Parallel, Ppo, Sft
from ftlaunch.rows.template import Row, Unfit
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import StageDir
from ftlaunch.run.spec import StageSpec
from fttrain.data.chat import Encoded, Encoder
from fttrain.distributed.stop_request import StopRequest
from fttrain.distributed.world import World

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), peers=())
ADAPTER = Lora(rank=4, alpha=8)
SILENT = NoNoise()


def make_data(path: Path, **fields: Any) -> Data:
    return Data(**{"path": str(path), "prompt": "{question}", "completion": "{answer}", **fields})


def make_step(
    model: Path,
    *datas: Data,
    adapter: Adapter = ADAPTER,
    optimizer: Optimizer | None = None,
    noise: Noise = SILENT,
    model_fields: dict[str, Any] | None = None,
    kind: type[Sft | Pairwise | Ppo] = Sft,
    start: str | None = None,
    **stage: Any,
) -> StageSpec:
    """What the launcher would write for one process; the keywords left over are the stage's."""
    tables = {f"rows{index}": data for index, data in enumerate(datas)}
    settings = {"steps": 6, "batch_size": 8, "learning_rate": 1e-2, "save_every": 2, **stage}
    if "epochs" in stage:
        del settings["steps"]
    spec = kind(data=list(tables), **settings)
    assert spec.learning_rate is not None
    return StageSpec(
        name="tiny",
        stage=spec,
        model=Model(path=str(model), **{"dtype": "fp32", **(model_fields or {})}),
        adapter=adapter,
        noise=noise,
        optimizer=optimizer or Optimizer(),
        parallel=Parallel(device="cpu"),
        data=tables,
        seed=7,
        deterministic=False,
        world_size=1,
        micro_batch_size=spec.micro_batch_size or spec.batch_size,
        accumulation=spec.batch_size // (spec.micro_batch_size or spec.batch_size),
        learning_rate=spec.learning_rate,
        start=start,
        training_hash="of-tiny",
    )


class StopAfter:
    """Asks to stop once so many steps have begun; never, where none are named."""

    def __init__(self, steps: int | None) -> None:
        self._left = steps

    def pending(self) -> str | None:
        return None

    def poll(self) -> str | None:
        if self._left is None:
            return None
        self._left -= 1
        return "the test" if self._left <= 0 else None


def start_afresh() -> None:
    """Leave accelerate as the start of a rank finds it, on the CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)


def train(spec: StageSpec, folder: Path, *, stop_after: int | None = None) -> StageDir:
    """Run a stage in `folder/01-KIND`, or go on with it; raises what it raises, `Stopped` after a stop.

    What starts from an artifact in the folder is the second stage, `02-KIND`.
    """
    kind = spec.stage.__struct_config__.tag
    stage_dir = StageDir(folder / f"{'02' if spec.start else '01'}-{kind}")
    stage_dir.path.mkdir(parents=True, exist_ok=True)
    start_afresh()
    stop = cast("StopRequest", StopAfter(stop_after))
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder / "cache")):
        result = importlib.import_module(f"fttrain.stages.{kind}").run(spec, stage_dir, ALONE, stop)
    write_json(stage_dir.result, result)
    return stage_dir


def copy(stage_dir: StageDir, folder: Path) -> StageDir:
    """The same step folder elsewhere, to go on with in another way."""
    return StageDir(Path(shutil.copytree(stage_dir.path, folder / stage_dir.name)))


def encode_row(encoder: Encoder, row: Row, where: str = "rows.jsonl:1") -> list[Encoded]:
    """Return what a row makes. Raises Unfit where that is nothing."""
    (made,) = encoder.encode_many([(where, row)])
    if isinstance(made, Unfit):
        raise made
    return made
