"""Commits of the hub that a run began with: the hub may change what a branch or a tag names, and the run goes on."""

from pathlib import Path

import msgspec
from msgspec.structs import replace

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.names import is_local
from ftlaunch.recipe.stages import Ppo
from ftlaunch.run.files import write_json
from ftlaunch.run.spec import StageSpec
from fttrain import hub
from fttrain.data import sources
from fttrain.distributed.world import World


def settle(spec: StageSpec, file: Path, world: World) -> StageSpec:
    """Return the spec with a commit as the revision of each data set, base and reward model of the hub. Collective.

    Commits stand in the run's file; those of names that are new to the run are asked for, and recorded. Raises
    UserError on all ranks where the hub, or its cache here, does not have what is named.
    """
    found: dict[str, str] | None = None
    error = ("", "")
    if world.is_main:
        try:
            found = _commits(spec, file)
        except UserError as mistake:
            error = (mistake.message, mistake.remedy)
    found, error = world.from_main((found, error))
    if found is None:
        raise UserError(*error)
    data = {
        name: table if is_local(table.path) else replace(table, revision=found[_name(table)])
        for name, table in spec.data.items()
    }
    model, stage = spec.model, spec.stage
    if not is_local(model.path):
        model = replace(model, revision=found[_model_name(model.path, model.revision)])
    if isinstance(stage, Ppo) and stage.reward_model and not is_local(stage.reward_model):
        stage = replace(stage, reward_revision=found[_model_name(stage.reward_model, stage.reward_revision)])
    return replace(spec, data=data, model=model, stage=stage)


def _model_name(path: str, revision: str | None) -> str:
    return f"model {path} {revision or 'main'}"


def _name(data: Data) -> str:
    return f"data {data.path} {data.revision or 'main'} {data.config or ''}".strip()


def _commits(spec: StageSpec, file: Path) -> dict[str, str]:
    """What is recorded, with what this stage is the first to name."""
    recorded = msgspec.json.decode(file.read_bytes(), type=dict[str, str]) if file.exists() else {}
    found = dict(recorded)
    for data in spec.data.values():
        if not is_local(data.path) and _name(data) not in found:
            found[_name(data)] = sources.commit_of(data)
    models = [(spec.model.path, spec.model.revision)]
    if isinstance(spec.stage, Ppo) and spec.stage.reward_model:
        models.append((spec.stage.reward_model, spec.stage.reward_revision))
    for path, revision in models:
        if not is_local(path) and _model_name(path, revision) not in found:
            found[_model_name(path, revision)] = hub.commit_of(path, revision)
    if found != recorded:
        write_json(file, found)
    return found
