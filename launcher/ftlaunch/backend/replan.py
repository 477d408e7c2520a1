"""A run that goes on by another plan: with more or fewer processes and other habits, or again from one of its stages.

Earlier stages are then kept, and those that depend on the one that it starts again at are removed.
"""

import shutil
from collections.abc import Sequence

import msgspec

from ftlaunch import rules
from ftlaunch.backend import backends, runs
from ftlaunch.backend.prepare import first_changed, write_plan
from ftlaunch.backend.protocol import Backend
from ftlaunch.errors import UserError
from ftlaunch.load import Loaded
from ftlaunch.load.messages import join_or
from ftlaunch.plan.plan import ON_THE_WAY, Plan, PlannedStage, make_plan
from ftlaunch.processes import lock
from ftlaunch.run.changes import NAMED, changed_under
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import RunDir


def replan(run: RunDir, settings: Sequence[str]) -> Plan:
    """The plan of a run with settings put in; stages that are finished stay as they were.

    RecipeError or UserError where the settings are wrong or would change what a stage that has begun learns.
    """
    before = runs.read_plan(run)
    after = make_plan(rules.check_resolved(run.resolved, settings).recipe, run.path)
    hashes = {planned.name: planned.spec.training_hash for planned in after.stages}
    for planned in before.stages:
        # A stage without an attempt has computed nothing yet, so it may still learn something else.
        if run.stage_dir(planned.name).attempts.exists() and hashes.get(planned.name) != planned.spec.training_hash:
            raise UserError(
                f"these settings would change what {planned.name} learns, and it has begun",
                f"it can still change {join_or(ON_THE_WAY)}; for the rest make a run of its own (--set name=…)",
            )
    kept = {planned.name: planned for planned in before.stages if run.stage_dir(planned.name).result.exists()}
    return msgspec.structs.replace(after, stages=[kept.get(planned.name, planned) for planned in after.stages])


def save_plan(run: RunDir, plan: Plan) -> None:
    """Have a run go on by another plan. UserError where it is running; the files of each stage follow as it starts."""
    with lock.hold(run):
        write_json(run.plan, plan)
        write_json(run.resolved, plan.recipe)


def obsolete_stages(run: RunDir, plan: Plan, stage: str) -> list[str]:
    """Folders of the run that must go so that it can start again at a stage of a plan, called by its folder or kind.

    A later stage stays if it is finished, is as it was planned, on the same data and base, and needs none of those.
    UserError where the run has no such stage, or where an earlier one would not be what it was.
    """
    before = runs.read_plan(run)
    first = plan.stages.index(runs.find_stage(plan.name, plan.stages, stage))
    changed = first_changed(before, plan)
    if changed is not None and plan.stages.index(changed) < first:
        raise UserError(
            f"{changed.name}, which comes before {plan.stages[first].name}, would be trained otherwise now",
            f"begin with it: --from {changed.name}",
        )
    _require_same_files(run, plan.stages[:first])
    hashes = {planned.name: planned.spec.training_hash for planned in before.stages}
    gone: list[str] = []
    for planned in plan.stages[first:]:
        same = hashes.get(planned.name) == planned.spec.training_hash and run.stage_dir(planned.name).result.exists()
        same = same and not changed_under(run, planned.spec)
        # start and reward are paths such as "01-sft/artifact", whose first part is the stage that makes it.
        needs = any(path and path.partition("/")[0] in gone for path in (planned.spec.start, planned.spec.reward))
        if planned is plan.stages[first] or needs or not same:
            gone.append(planned.name)
    names = {planned.name for planned in plan.stages}
    # A run's stages are the folders that are there: one that the recipe no longer has would keep the run unfinished.
    gone += [folder.name for folder in run.stage_dirs() if folder.name not in names]
    return [name for name in gone if run.stage_dir(name).path.exists()]


def _require_same_files(run: RunDir, kept: Sequence[PlannedStage]) -> None:
    """UserError where data or the base of a stage that is kept is not what it was trained on."""
    for planned in kept:
        if found := changed_under(run, planned.spec):
            raise UserError(
                f"{planned.name} would be kept, and {'; '.join(found[:NAMED])}",
                f"put back what was there, or begin with it: --from {planned.name}",
            )


def rerun_from(run: RunDir, plan: Plan, loaded: Loaded, backend: Backend, removed: list[str]) -> None:
    """Remove stages and write the plan that the run goes on by, here or on a cluster. UserError where it is running."""
    if not backends.of(run).is_over(run):
        raise UserError(f"{run.path.name} is running", f"end it first: ftlaunch stop {run.in_shell}")
    with lock.hold(run):
        for name in removed:
            run.stage_dir(name).result.unlink(missing_ok=True)  # first of all: without it nothing counts as finished
        for name in removed:
            shutil.rmtree(run.stage_dir(name).path)
        write_plan(run, plan, loaded, backend)
