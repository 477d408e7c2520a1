"""What SLURM alone has in the folders of a run, its stages and their attempts: every path of it."""

from pathlib import Path

from ftlaunch.run.layout import Attempt, RunDir, StageDir

JOBS = "jobs"
"""The folder of each stage with the batch scripts of its jobs, by which they are known."""


def cluster(run: RunDir) -> Path:
    """The profile of the cluster that a run was submitted to; a run that a process drives has none."""
    return run.path / "cluster.json"


def held(run: RunDir) -> Path:
    """The profile by which a run was started on nodes that its user held; any other run has none."""
    return run.path / "held.json"


def held_by(run: RunDir) -> Path:
    """The job whose nodes such a run was started on last."""
    return run.path / "held_by.json"


def submission(run: RunDir) -> Path:
    """The cluster that a run was submitted to last, and whether all of its jobs were taken."""
    return run.path / "submission.json"


def environment(run: RunDir) -> Path:
    """Variables of the submitting shell that the stages' processes are given on the nodes."""
    return run.path / "environment.json"


def packages(run: RunDir) -> Path:
    """ftlaunch and fttrain as they were when a run was submitted: what its jobs import."""
    return run.path / "packages"


def job(stage_dir: StageDir) -> Path:
    """The newest job of a stage."""
    return stage_dir.path / "job.json"


def jobs(stage_dir: StageDir) -> Path:
    """The folder that submitit keeps a stage's jobs in, with script, call and output of each."""
    return stage_dir.path / JOBS


def job_output(stage_dir: StageDir, id: str) -> Path:
    """What the batch script of a job said, and its first task."""
    return jobs(stage_dir) / f"{id}_0_log.out"


def made_by(attempt: Attempt) -> Path:
    """The job, and its restart, that made an attempt."""
    return attempt.path / "made_by.json"


def report(attempt: Attempt, node: int) -> Path:
    """How the processes of one node ended."""
    return attempt.path / f"node{node}.json"


def hung(attempt: Attempt) -> Path:
    """Seconds without a step, written where an attempt was found to hang."""
    return attempt.path / "hung.json"


def ended(attempt: Attempt) -> Path:
    """How an attempt ended, on which nodes, and what was done about it."""
    return attempt.path / "ended.json"
