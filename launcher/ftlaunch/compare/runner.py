"""Running trials where a backend has them run; what has finished is not run again."""

from collections.abc import Sequence
from pathlib import Path

from ftlaunch.backend import backends, runs
from ftlaunch.backend.driving import Driven
from ftlaunch.backend.prepare import first_changed, prepare
from ftlaunch.backend.protocol import Backend, Say
from ftlaunch.compare.variants import Trial
from ftlaunch.errors import UserError
from ftlaunch.run.layout import RunDir


def conduct(trials: Sequence[Trial], backend: Backend, at_once: int | None, say: Say) -> int:
    """Run what has not finished; the exit code. A failing trial does not keep the others from running.

    UserError where a trial's folder holds something else, and before the first folder is written where one trial
    cannot be started.
    """
    for trial in trials:
        backend.check(trial.loaded)
    for trial in trials:
        backend.require(trial.plan, None)
    folders = {f"{trial.variant.label}, seed {trial.seed}": _folder(trial, backend) for trial in trials}
    return backend.conduct(folders, at_once, say)


def _folder(trial: Trial, backend: Backend) -> RunDir:
    """The trial's run folder, written where it is not there yet, and the backend's where it is at rest."""
    path = Path(trial.plan.run_dir)
    if not runs.is_run(path):
        return prepare(trial.plan, trial.loaded, backend)
    folder = RunDir(path)
    if first_changed(runs.read_plan(folder), trial.plan) is not None:
        remedy = "name another folder with --dir, or remove this one"
        raise UserError(f"{path} holds a run of another recipe or other settings", remedy)
    if runs.finished(folder):
        return folder
    if isinstance(backend, Driven):
        # Called for its refusal: a run that was submitted to a cluster is not driven from here.
        backends.driven(folder)
    elif isinstance(backends.of(folder), Driven):
        backends.move(folder, backend)
    return folder
