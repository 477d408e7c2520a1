"""Telling the user that a run has ended, by the profile's own line of bash."""

import os
import subprocess
import sys

from ftlaunch.backend.slurm.restart_policy import AttemptRecord
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.run.layout import StageDir

NOTIFY_SECONDS = 60.0


def notify(cluster: Cluster, stage_dir: StageDir, ended: AttemptRecord, *, is_last: bool) -> None:
    """Run the profile's line for the end of a run, whatever comes of it."""
    if cluster.notify is None or (ended.cause == "done" and not is_last):
        return
    # A preempted stage that restarts never gets here; for the user, this one has stopped.
    state = "stopped" if ended.cause == "preempted" else ended.cause
    told = {"RUN": str(stage_dir.run.path), "STAGE": stage_dir.name, "STATE": state, "REASON": ended.reason}
    variables = os.environ | {f"FTLAUNCH_{name}": value for name, value in told.items()}
    try:
        subprocess.run(["bash", "-c", cluster.notify], env=variables, timeout=NOTIFY_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"notify: {error}", file=sys.stderr)
