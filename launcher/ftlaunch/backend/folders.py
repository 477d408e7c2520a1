"""Folders of runs and their stages: private, with the files that the plan says, and removed where nothing has begun."""

import shutil
from pathlib import Path

from ftlaunch.plan.plan import PlannedStage
from ftlaunch.run.files import write_atomic
from ftlaunch.run.layout import RunDir


def write_files(run: RunDir, planned: PlannedStage) -> None:
    """Have a stage's files say what its plan says, which may have changed since they were written."""
    stage_dir = run.stage_dir(planned.name)
    if not stage_dir.path.exists():
        make_private_folder(stage_dir.path)
    for path in (stage_dir.step, stage_dir.accelerate, stage_dir.deepspeed):
        content = planned.files.get(path.name)
        # For example deepspeed.json after `resume --set parallel.strategy=single`: only ZeRO has one.
        if content is None:
            path.unlink(missing_ok=True)
        elif not path.exists() or path.read_text() != content:
            write_atomic(path, content)


def make_private_folder(path: Path) -> None:
    """Make a folder that its owner alone may enter."""
    path.mkdir(mode=0o700)
    path.chmod(0o700)  # a umask may have taken the owner's own rights


def discard(run: RunDir) -> None:
    """Remove a run of which nothing has begun."""
    assert not any(stage_dir.attempts.exists() or stage_dir.result.exists() for stage_dir in run.stage_dirs())
    shutil.rmtree(run.path)
