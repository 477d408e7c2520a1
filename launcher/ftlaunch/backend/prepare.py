"""Plan → run folder, all of it or nothing."""

import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import UserError
from ftlaunch.plan.plan import Plan, PlannedStage
from ftlaunch.processes import lock
from ftlaunch.run import provenance, snapshot
from ftlaunch.run.files import sync_folder, temporary_path, write_atomic, write_json
from ftlaunch.run.layout import RunDir
from ftlaunch.safety import trust
from ftlaunch.safety.redact import has_secret
from ftlaunch.watch import runs
from ftlaunch.watch.status import is_over

if TYPE_CHECKING:
    from ftlaunch.rules import Loaded


def prepare(plan: Plan, loaded: "Loaded", cluster: Cluster | None = None) -> RunDir:
    """Write the folder of a planned run, or find it where this very run has finished already.

    `cluster` is where it will run, if not on this machine.

    UserError where the folder is taken by another recipe or by an unfinished run, cannot be written, or lies where
    anyone could swap it.
    """
    target = Path(plan.run_dir)
    aside = temporary_path(target)
    if has_secret(str(target)):
        raise UserError(f"{target} holds what looks like a secret", "choose another folder with --run-dir")
    try:
        trust.require_place(target)
        if target.exists():
            return _existing(target, plan)
        _write(RunDir(aside), plan, loaded, cluster)
        aside.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise UserError(
            f"{target} cannot be written: {error.strerror}", "make room or choose another folder with --run-dir"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return RunDir(target)


def discard(run: RunDir) -> None:
    """Remove a run of which nothing has begun."""
    assert not any(stage_dir.attempts.exists() or stage_dir.result.exists() for stage_dir in run.stage_dirs())
    shutil.rmtree(run.path)


def _existing(target: Path, plan: Plan) -> RunDir:
    run = RunDir(target)
    remedy = "give this run another name (--set name=…) or folder (--run-dir), or remove that one"
    if not runs.is_run(target):
        raise UserError(f"{target} exists and holds no run", remedy)
    changed = first_changed(runs.read_plan(run), plan)
    if changed is not None:
        kept = [planned.name for planned in plan.stages[: plan.stages.index(changed)]]
        remedy += f"; or keep {', '.join(kept)} and begin anew with --from {changed.name}" if kept else ""
        raise UserError(f"{target} exists and holds another recipe", remedy)
    if not runs.finished(run):
        lock.release(lock.take(run))
        if not is_over(run):
            where = shlex.quote(str(target))
            raise UserError(f"{target} is in the queue already, or runs", f"watch it: ftlaunch status {where}")
        raise UserError(
            f"{target} exists and has not finished", f"go on with it: ftlaunch resume {shlex.quote(str(target))}"
        )
    return run


def first_changed(before: Plan, after: Plan) -> PlannedStage | None:
    """The first stage of a plan that would not do what the other plan's stage at its place does; None where all do."""
    known = [(planned.name, planned.spec.training_hash) for planned in before.stages]
    for index, planned in enumerate(after.stages):
        if index >= len(known) or known[index] != (planned.name, planned.spec.training_hash):
            return planned
    return after.stages[-1] if len(known) > len(after.stages) else None


def _write(run: RunDir, plan: Plan, loaded: "Loaded", cluster: Cluster | None) -> None:
    run.path.parent.mkdir(parents=True, exist_ok=True)
    _private_folder(run.path)
    write_plan(run, plan, loaded, cluster)


def write_plan(run: RunDir, plan: Plan, loaded: "Loaded", cluster: Cluster | None) -> None:
    """The files of a run as a whole, and those of each of its stages."""
    write_atomic(run.recipe, loaded.text)
    write_json(run.resolved, plan.recipe)
    write_json(run.plan, plan)
    write_json(run.provenance, provenance.collect(plan.recipe, loaded.source))
    if cluster is None:
        run.cluster.unlink(missing_ok=True)
    else:
        write_json(run.cluster, cluster)
        snapshot.take(run, loaded.source, plan.recipe)
    for planned in plan.stages:
        write_files(run, planned)


def write_files(run: RunDir, planned: PlannedStage) -> None:
    """Have a stage's files say what its plan says, which may have changed since they were written."""
    stage_dir = run.stage_dir(planned.name)
    if not stage_dir.path.exists():
        _private_folder(stage_dir.path)
    for path in (stage_dir.step, stage_dir.accelerate, stage_dir.deepspeed):
        content = planned.files.get(path.name)
        if content is None:
            path.unlink(missing_ok=True)
        elif not path.exists() or path.read_text() != content:
            write_atomic(path, content)


def _private_folder(path: Path) -> None:
    path.mkdir(mode=0o700)
    path.chmod(0o700)  # a umask may have taken the owner's own rights
