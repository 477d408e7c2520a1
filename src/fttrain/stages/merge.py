"""The merge stage: fold the artifact of the stage before, on one process."""

import shutil
from typing import Any

from ftlaunch.recipe import Merge
from ftlaunch.run.layout import StepDir
from ftlaunch.run.spec import Step
from fttrain.distributed.stop_request import StopRequest
from fttrain.distributed.world import World
from fttrain.merging.merge import as_result, find_source, merge


def run(step: Step, folder: StepDir, world: World, stop: StopRequest) -> dict[str, Any]:  # noqa: ARG001 every stage's
    """Write the merged model to the step folder's `model`; returns how like it is to the adapter model."""
    assert isinstance(step.stage, Merge)
    assert step.start is not None, "rules.py asks for a training stage before a merge"
    shutil.rmtree(folder.model, ignore_errors=True)  # of an attempt that ended before it could say so in result.json
    merged = merge(find_source(folder.path.parent / step.start), folder.model, step.stage)
    print(f"merged: {merged.likeness}")
    return as_result(merged)
