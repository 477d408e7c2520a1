"""Finding a run by what the user calls it, and the plan that its folder holds."""

import os
import pwd
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from ftlaunch.errors import UserError
from ftlaunch.plan.plan import Plan, PlannedStage
from ftlaunch.run import HOME
from ftlaunch.run.layout import RunDir, StageDir

Stage = TypeVar("Stage", StageDir, PlannedStage)


def all_runs() -> list[RunDir]:
    """The runs below ./runs, oldest first."""
    if not HOME.is_dir():
        return []
    # A hidden folder is a run that `prepare` is still writing, or was writing when it was killed.
    readable = [path for path in HOME.iterdir() if os.access(path, os.X_OK, effective_ids=True)]
    folders = [path for path in readable if is_run(path) and not path.name.startswith(".")]
    return [RunDir(path.absolute()) for path in sorted(folders, key=lambda path: (path / "plan.json").stat().st_mtime)]


def is_run(path: Path) -> bool:
    """Return whether a folder is a run: it has a plan."""
    return (path / "plan.json").is_file()


def look_for(name: str) -> RunDir | None:
    """The run in a folder, or of a name below ./runs; None where there is none."""
    found = next((path for path in (Path(name), HOME / name) if is_run(path)), None)
    return None if found is None else RunDir(found.absolute())


def require_own(run: RunDir) -> None:
    """UserError where a run is somebody else's, and its folder not to be written."""
    owner = run.path.stat().st_uid
    if owner == os.geteuid() or os.access(run.path, os.W_OK, effective_ids=True):
        return
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = f"user {owner}"
    raise UserError(f"{run.path} is the run of {name}, and you may not write there", f"ask {name} to do it")


def find(name: str) -> RunDir:
    """`look_for`. UserError, listing those there are, where there is none."""
    if (run := look_for(name)) is not None:
        return run
    known = ", ".join(run.path.name for run in all_runs())
    remedy = f"there are: {known}" if known else f"there is no run below {HOME.absolute()}; name a run folder"
    raise UserError(f"there is no run {name!r}", remedy)


def find_stage(whose: str, stages: Sequence[Stage], name: str) -> Stage:
    """The stage that is called `01-sft`, or by its kind where only one is of that. UserError otherwise."""
    found = [stage for stage in stages if name in (stage.name, stage.name.partition("-")[2])]
    if len(found) == 1:
        return found[0]
    message = f"{whose} has {len(found)} stages {name!r}" if found else f"{whose} has no stage {name!r}"
    raise UserError(message, f"name one of {', '.join(stage.name for stage in stages)}")


def read_plan(run: RunDir) -> Plan:
    """The plan that a run was written from. UserError where it is of another version of ftlaunch."""
    try:
        return msgspec.json.decode(run.plan.read_bytes(), type=Plan)
    except msgspec.DecodeError as error:
        raise UserError(
            f"{run.plan} cannot be read: {error}", "go on with the ftlaunch that wrote it (see provenance.json)"
        ) from error


def finished(run: RunDir) -> bool:
    """Whether every stage has its result."""
    return not run.unfinished()


def first_unfinished(run: RunDir) -> StageDir | None:
    """The stage whose turn it is; None where every stage has its result."""
    return next(iter(run.unfinished()), None)


def unfinished(run: RunDir, plan: Plan) -> list[PlannedStage]:
    """The stages of a run's plan that have no result yet."""
    return [planned for planned in plan.stages if not run.stage_dir(planned.name).result.exists()]
