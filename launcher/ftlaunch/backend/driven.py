"""How runs stand that a process drives: read from their folders and the process table of this machine."""

import msgspec

from ftlaunch import processes
from ftlaunch.backend.status import RunStatus, StageStatus, State, measured, run_status
from ftlaunch.processes import Identity, lock
from ftlaunch.processes.outcome import Done, Failure, Stopped, read_outcome
from ftlaunch.run.files import read_json
from ftlaunch.run.layout import Attempt, RunDir, StageDir

_DRIVEN: dict[bool | None, State] = {True: "running", False: "waiting", None: "unknown"}


def state(run: RunDir) -> RunStatus:
    """How a run and its stages stand now."""
    driver = lock.holder(run)
    found = run_status(run, [_stage_status(stage_dir, driver) for stage_dir in run.stage_dirs()])
    if found.state == "waiting" and driver:  # between two stages, or about to start the first
        return msgspec.structs.replace(found, state=_DRIVEN[processes.is_alive(driver)])
    return found


def is_over(run: RunDir) -> bool:
    """Whether nothing of a run works any more. False where that cannot be seen from here, unless it has signed off."""
    driver = lock.holder(run)
    # is_alive returns None for a driver on another host: that run may be at work. Even if a driver of this machine is
    # dead, ranks may outlive it, so they are looked for as well.
    return (driver is None or processes.is_alive(driver) is False) and not processes.of_attempts(run.path)


def _stage_status(stage_dir: StageDir, driver: Identity | None) -> StageStatus:
    attempts = stage_dir.all_attempts()
    return measured(stage_dir, len(attempts), *_state(stage_dir, attempts, driver))


def _state(stage_dir: StageDir, attempts: list[Attempt], driver: Identity | None) -> tuple[State, str | None]:
    """Return the state in which the newest attempt left a stage, and a remark on it."""
    if not attempts:
        return ("done" if stage_dir.result.exists() else "waiting"), None
    newest = attempts[-1]
    involved = [who for who in (driver, read_json(newest.process, Identity)) if who]
    # Looked up first: an attempt may end, and say how, right after it was found alive.
    alive = {processes.is_alive(who): who.host for who in involved}
    match read_outcome(stage_dir, newest):
        case Done():
            return "done", None
        case Stopped():
            return "stopped", None
        case Failure() as failure:
            return "failed", failure.first_line
        case None if True in alive:
            return "running", None
        case None if None in alive:
            return "unknown", f"started on {alive[None]}"
        case None:
            return "interrupted", None
