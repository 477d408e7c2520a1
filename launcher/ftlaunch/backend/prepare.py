"""Plan → run folder, all of it or nothing."""

import shutil
from pathlib import Path

from ftlaunch.backend import backends, runs
from ftlaunch.backend.folders import make_private_folder, write_files
from ftlaunch.backend.protocol import Backend
from ftlaunch.errors import UserError
from ftlaunch.load import Loaded
from ftlaunch.plan.plan import Plan, PlannedStage
from ftlaunch.processes import lock
from ftlaunch.run import provenance
from ftlaunch.run.files import sync, temporary_path, write_atomic, write_json
from ftlaunch.run.layout import RunDir
from ftlaunch.safety import trust
from ftlaunch.safety.redact import has_secret


def prepare(plan: Plan, loaded: Loaded, backend: Backend) -> RunDir:
    """Write the folder of a planned run, or find it where this very run has finished already.

    `backend` is where it will run.

    UserError where the folder is taken by another recipe or by an unfinished run, cannot be written, or lies where
    anyone could swap it.
    """
    target = Path(plan.run_dir)
    partial = temporary_path(target)
    if has_secret(str(target)):
        raise UserError(f"{target} holds what looks like a secret", "choose another folder with --run-dir")
    try:
        trust.require_place(target)
        if target.exists():
            return _existing(target, plan)
        partial.parent.mkdir(parents=True, exist_ok=True)
        make_private_folder(partial)
        write_plan(RunDir(partial), plan, loaded, backend)
        # rename() does not replace a folder that has files in it, so a run that someone else has just made is safe.
        partial.rename(target)
        sync(target.parent)
    except OSError as error:
        raise UserError(
            f"{target} cannot be written: {error.strerror}", "make room or choose another folder with --run-dir"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return RunDir(target)


def _existing(target: Path, plan: Plan) -> RunDir:
    run = RunDir(target)
    remedy = "give this run another name (--set name=…) or folder (--run-dir), or remove that one"
    if not runs.is_run(target):
        raise UserError(f"{target} exists and holds no run", remedy)
    changed = first_changed(runs.read_plan(run), plan)
    if changed is not None:
        kept = [planned.name for planned in plan.stages[: plan.stages.index(changed)]]
        remedy += f"; or keep {', '.join(kept)} and rerun with --from {changed.name}" if kept else ""
        raise UserError(f"{target} exists and holds another recipe", remedy)
    if not runs.finished(run):
        # take() refuses with the name of a driver on this machine. Jobs of a cluster hold no lock while they wait or
        # work, so the backend is asked as well.
        lock.release(lock.take(run))
        if not backends.of(run).is_over(run):
            raise UserError(f"{target} is in the queue already, or runs", f"watch it: ftlaunch status {run.in_shell}")
        raise UserError(f"{target} exists and has not finished", f"go on with it: ftlaunch resume {run.in_shell}")
    return run


def first_changed(before: Plan, after: Plan) -> PlannedStage | None:
    """The first stage of a plan that would not do what the other plan's stage at its place does; None where all do."""
    # The hash covers what a stage learns but not how the work is shared out: the same training on twice as many
    # processes is the same run.
    known = [(planned.name, planned.spec.training_hash) for planned in before.stages]
    for index, planned in enumerate(after.stages):
        if index >= len(known) or known[index] != (planned.name, planned.spec.training_hash):
            return planned
    return after.stages[-1] if len(known) > len(after.stages) else None


def write_plan(run: RunDir, plan: Plan, loaded: Loaded, backend: Backend) -> None:
    """The files of a run as a whole, and those of each of its stages."""
    write_atomic(run.recipe, loaded.text)
    write_json(run.resolved, plan.recipe)
    write_json(run.plan, plan)
    write_json(run.provenance, provenance.collect(plan.recipe, loaded.source))
    backends.claim(run, backend, loaded.source)
    for planned in plan.stages:
        write_files(run, planned)
