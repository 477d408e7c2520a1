"""Files of a run's project as they were when it was submitted: what is edited while its jobs wait changes nothing."""

from msgspec import Struct
from msgspec.structs import replace

from ftlaunch.recipe.stages import Evaluate, Ppo, Training
from ftlaunch.run.files import read_json
from ftlaunch.run.layout import RunDir
from ftlaunch.run.spec import StageSpec


class Snapshot(Struct, frozen=True, kw_only=True):
    """What code.json holds."""

    files: dict[str, str]
    """Absolute path of a file → path of its copy, relative to the run's folder."""


def redirect(spec: StageSpec, run: RunDir) -> StageSpec:
    """Return the spec with the copies of the files that it names, where there are any."""
    if (snapshot := read_json(run.code_index, Snapshot)) is None:
        return spec
    # Small data files of the project were copied along with its code, so data tables may change, too.
    copies = {original: str(run.path / copy) for original, copy in snapshot.files.items()}
    data = {
        name: replace(
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
        stage = replace(stage, reward_function=f"{copies.get(place, place)}{colon}{name}")
    if isinstance(stage, Training):
        scored = [copies.get(metric, metric) for metric in stage.eval_metrics]
        stage = replace(stage, eval_metrics=scored)
    if isinstance(stage, Evaluate):
        stage = replace(stage, metrics=[copies.get(metric, metric) for metric in stage.metrics])
    return replace(spec, data=data, stage=stage)
