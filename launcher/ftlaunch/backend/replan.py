"""A run that goes on in another way: more or fewer processes, another strategy, other habits."""

from collections.abc import Sequence

import msgspec

from ftlaunch import rules
from ftlaunch.backend import runs
from ftlaunch.errors import UserError
from ftlaunch.load.messages import join_or
from ftlaunch.plan.plan import ON_THE_WAY, Plan, make_plan
from ftlaunch.processes import lock
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
