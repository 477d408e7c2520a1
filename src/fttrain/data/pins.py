"""Commits of the hub that a run began with: the hub may change what a branch or a tag names, and the run goes on."""

from pathlib import Path

import msgspec
from msgspec.structs import replace

from ftlaunch.errors import UserError
from ftlaunch.recipe import Data
from ftlaunch.recipe.names import is_local
from ftlaunch.run.files import write_json
from ftlaunch.run.spec import StageSpec
from fttrain import hub
from fttrain.data import sources
from fttrain.distributed.world import World


def settle(spec: StageSpec, file: Path, world: World) -> StageSpec:
    """Return the spec with a commit as the revision of each data set and base of the hub. Collective.

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
    model = spec.model
    if not is_local(model.path):
        model = replace(model, revision=found[f"model {model.path} {model.revision or 'main'}"])
    return replace(spec, data=data, model=model)


def _name(data: Data) -> str:
    return f"data {data.path} {data.revision or 'main'} {data.config or ''}".strip()


def _commits(spec: StageSpec, file: Path) -> dict[str, str]:
    """What is recorded, with what this stage is the first to name."""
    recorded = msgspec.json.decode(file.read_bytes(), type=dict[str, str]) if file.exists() else {}
    found = dict(recorded)
    for data in spec.data.values():
        if not is_local(data.path) and _name(data) not in found:
            found[_name(data)] = sources.commit_of(data)
    name = f"model {spec.model.path} {spec.model.revision or 'main'}"
    if not is_local(spec.model.path) and name not in found:
        found[name] = hub.commit_of(spec.model.path, spec.model.revision)
    if found != recorded:
        write_json(file, found)
    return found
