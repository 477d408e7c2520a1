"""Running trials on this machine, one after another; what has finished is not run again."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ftlaunch.backend import backends, control, runs
from ftlaunch.backend.prepare import first_changed, prepare
from ftlaunch.compare.variants import Trial
from ftlaunch.errors import DONE, STAGE_FAILED, UserError
from ftlaunch.processes.signals import StopSignals
from ftlaunch.run.layout import RunDir


def conduct(trials: Sequence[Trial], say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> int:
    """Run what has not finished; the exit code. A failing trial does not keep the others from running; a signal does.

    UserError where a trial's folder holds something else.
    """
    for trial in trials:
        backends.here().require_nodes(trial.plan)
    folders = [_folder(trial) for trial in trials]
    # One listener for all trials: a Ctrl-C that comes between two of them is not lost.
    with StopSignals() as interrupts:
        return _conduct(trials, folders, interrupts, say)


def _conduct(
    trials: Sequence[Trial], folders: Sequence[RunDir], interrupts: StopSignals, say: Callable[[str], None]
) -> int:
    code = DONE
    for number, (trial, folder) in enumerate(zip(trials, folders, strict=True), start=1):
        told = f"trial {number} of {len(trials)}: {trial.variant.label}, seed {trial.seed}"
        if runs.finished(folder):
            say(f"{told}: finished")
            continue
        if interrupts.wish != "go on":
            return interrupts.exit_code
        say(told)
        ended = control.drive_here(folder, interrupts=interrupts)
        # A mistake of the user's or a signal ends the comparison; a failing stage concerns its own trial only.
        if ended not in (DONE, STAGE_FAILED):
            return ended
        code = max(code, ended)
    return code


def _folder(trial: Trial) -> RunDir:
    """The trial's run folder, written where it is not there yet."""
    path = Path(trial.plan.run_dir)
    if not runs.is_run(path):
        return prepare(trial.plan, trial.loaded, backends.here())
    folder = RunDir(path)
    if first_changed(runs.read_plan(folder), trial.plan) is not None:
        remedy = "name another folder with --dir, or remove this one"
        raise UserError(f"{path} holds a run of another recipe or other settings", remedy)
    if not runs.finished(folder):
        # Called for its refusal: a run that was submitted to a cluster is not driven from here.
        backends.driven(folder)
    return folder
