"""Files of a run's project as they were when it was submitted: what is edited while its jobs wait changes nothing."""

import msgspec
from msgspec import Struct

from ftlaunch.recipe import Evaluate, Ppo, Training
from ftlaunch.run.layout import RunDir
from ftlaunch.run.spec import StageSpec


class Snapshot(Struct, frozen=True, kw_only=True):
    """What code.json holds."""

    files: dict[str, str]
    """Absolute path of a file → path of its copy, relative to the run's folder."""


def redirect(spec: StageSpec, run: RunDir) -> StageSpec:
    """Return the spec with the copies of the files that it names, where there are any."""
    if not run.code_index.exists():
        return spec
    snapshot = msgspec.json.decode(run.code_index.read_bytes(), type=Snapshot)
    # Small data files of the project were copied along with its code, so data tables may change, too.
    copies = {original: str(run.path / copy) for original, copy in snapshot.files.items()}
    data = {
        name: msgspec.structs.replace(
            table,
            path=copies.get(table.path, table.path),
            eval=table.eval and copies.get(table.eval, table.eval),
            template=copies.get(table.template, table.template),
        )
        for name, table in spec.data.items()
    }
    stage = spec.stage
    if isinstance(stage, Ppo) and stage.reward_function:
        place, colon, name = stage.reward_function.rpartition(":")
        stage = msgspec.structs.replace(stage, reward_function=f"{copies.get(place, place)}{colon}{name}")
    if isinstance(stage, Training):
        scored = [copies.get(metric, metric) for metric in stage.eval_metrics]
        stage = msgspec.structs.replace(stage, eval_metrics=scored)
    if isinstance(stage, Evaluate):
        stage = msgspec.structs.replace(stage, metrics=[copies.get(metric, metric) for metric in stage.metrics])
    return msgspec.structs.replace(spec, data=data, stage=stage)
