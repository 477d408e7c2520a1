"""The merge stage: fold the previous stage's adapter into its base, in one process."""

import json
import shlex
import shutil

from ftlaunch.recipe.stages import Merge
from ftlaunch.run.layout import RunDir, StageDir
from ftlaunch.run.records import MergeResult
from ftlaunch.run.spec import StageSpec
from fttrain.distributed.stop_request import StopRequest
from fttrain.distributed.world import World
from fttrain.merging.merge import find_source, merge


def run(spec: StageSpec, folder: StageDir, world: World, stop: StopRequest) -> MergeResult:  # noqa: ARG001 every stage's
    """Write the merged model to the step folder's `model`; returns how like it is to the adapter model."""
    assert isinstance(spec.stage, Merge)
    assert spec.start is not None, "rules.py asks for a training stage before a merge"
    shutil.rmtree(folder.model, ignore_errors=True)  # left by an attempt that ended before it wrote result.json
    source = find_source(folder.path.parent / spec.start)
    merged = merge(source, folder.model, spec.stage, lambda max_kl: _go_on(folder, max_kl))
    print(f"merged: {merged}")
    return merged


def _go_on(folder: StageDir, max_kl: str) -> str:
    """Return the command that continues a run whose merge is accepted with a larger `max_kl`."""
    run = folder.run
    place = _place_in_recipe(run, folder.name)
    if place is None:
        return f'write [[stage]] kind = "merge", max_kl = {max_kl} there; ftlaunch run RECIPE --from {folder.name}'
    return shlex.join(["ftlaunch", "resume", str(run.path), "--set", f"stage.{place}.max_kl={max_kl}"])


def _place_in_recipe(run: RunDir, name: str) -> int | None:
    """Return the index of a planned stage in the recipe; None for a merge that the plan has inserted."""
    plan = json.loads(run.plan.read_text())
    kinds = [stage["kind"] for stage in plan["recipe"]["stage"]]
    place = 0
    for planned in plan["steps"]:
        is_written = kinds[place : place + 1] == [StageDir(run.path / planned["name"]).kind]
        if planned["name"] == name:
            return place if is_written else None
        place += is_written
    return None
