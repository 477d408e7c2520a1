"""A run that begins anew at one of its stages: what comes before is kept, and what depends on it is removed."""

import shutil
from typing import TYPE_CHECKING

from ftlaunch.backend.prepare import first_changed, write_plan
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import UserError
from ftlaunch.plan.plan import Plan, PlannedStep
from ftlaunch.processes import lock
from ftlaunch.run.layout import RunDir
from ftlaunch.watch import runs
from ftlaunch.watch.status import is_over

if TYPE_CHECKING:
    from ftlaunch.rules import Loaded


def removed_from(run: RunDir, plan: Plan, stage: str) -> list[str]:
    """Folders of the run that must go so that it can begin anew at a stage of a plan, called by its folder or kind.

    A stage behind it stays if it is finished, as it was planned, and needs none of those. UserError where the run has
    no such stage, or where one ahead of it would not be what it was.
    """
    before = runs.read_plan(run)
    first = plan.steps.index(_find(plan, stage))
    changed = first_changed(before, plan)
    if changed is not None and plan.steps.index(changed) < first:
        raise UserError(
            f"{changed.name}, which is ahead of {plan.steps[first].name}, would be trained otherwise now",
            f"begin with it: --from {changed.name}",
        )
    hashes = {step.name: step.step.training_hash for step in before.steps}
    gone: list[str] = []
    for step in plan.steps[first:]:
        same = hashes.get(step.name) == step.step.training_hash and run.step_dir(step.name).result.exists()
        needs = any(path and path.partition("/")[0] in gone for path in (step.step.start, step.step.reward))
        if step is plan.steps[first] or needs or not same:
            gone.append(step.name)
    planned = {step.name for step in plan.steps}
    gone += [folder.name for folder in run.step_dirs() if folder.name not in planned]
    return [name for name in gone if run.step_dir(name).path.exists()]


def _find(plan: Plan, stage: str) -> PlannedStep:
    found = [step for step in plan.steps if stage in (step.name, step.name.partition("-")[2])]
    if len(found) == 1:
        return found[0]
    message = f"{plan.name} has {len(found) or 'no'} stage{'s' if len(found) > 1 else ''} {stage!r}"
    raise UserError(message, f"name one of {', '.join(step.name for step in plan.steps)}")


def begin_anew(run: RunDir, plan: Plan, loaded: "Loaded", cluster: Cluster | None, removed: list[str]) -> None:
    """Remove stages and write the plan that the run goes on by, here or on a cluster. UserError where it is running."""
    if not is_over(run):
        raise UserError(f"{run.path.name} is running", f"end it first: ftlaunch stop {run.path}")
    held = lock.take(run)
    try:
        for name in removed:
            run.step_dir(name).result.unlink(missing_ok=True)  # first of all: without it nothing counts as finished
        for name in removed:
            shutil.rmtree(run.step_dir(name).path)
        write_plan(run, plan, loaded, cluster)
    finally:
        lock.release(held)
