"""Stages as SLURM jobs: submitit hands each over with its batch script, to start when the one before has succeeded."""

import os
import re
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env

from ftlaunch.backend.prepare import write_files
from ftlaunch.backend.slurm import entry as job_entry
from ftlaunch.backend.slurm.request import Batch, executor
from ftlaunch.backend.slurm.save_budget import require_time_to_save
from ftlaunch.cluster import queue
from ftlaunch.cluster.queue import Job
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import UserError
from ftlaunch.plan.plan import Plan
from ftlaunch.processes import lock
from ftlaunch.run import snapshot
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import RunDir, StepDir
from ftlaunch.safety.redact import names_secret

CARRIED = re.compile(
    r"(HF|HUGGING_FACE|TRANSFORMERS|TOKENIZERS|TORCH|TRITON|NCCL|GLOO|OMP|MKL|CUDA|DS|ACCELERATE|XDG)_[A-Z0-9_]+"
    r"|LD_LIBRARY_PATH|(https?|no)_proxy|(HTTPS?|NO)_PROXY"
)
"""Variables that matter to the stages' processes, but for secrets. They travel in a file of the run's folder."""
REASON = re.compile(r"^sbatch: (?:error: )?(.+)$", re.MULTILINE)


def submit(run: RunDir, plan: Plan) -> list[Job]:
    """Submit the unfinished stages, each to start when the one before has succeeded, and return their jobs in order.

    A run that was submitted before takes its code anew. UserError where the run still has jobs, where its steps take
    too long to save in time, or where sbatch refuses one: then none of them is left in the queue.
    """
    held = lock.take(run)
    try:
        refuse_twice(run)
        require_time_to_save(run, plan, cluster := queue.read_cluster(run))
        if not run.code_index.exists() or any(step.job.exists() for step in run.step_dirs()):
            snapshot.retake(run, plan.recipe)
        return _submit_all(run, plan, cluster)
    finally:
        lock.release(held)


def _submit_all(run: RunDir, plan: Plan, cluster: Cluster) -> list[Job]:
    jobs: list[Job] = []
    with _private(), _leading_to(cluster):
        write_json(run.environment, _carried())
        for planned in plan.steps:
            step = run.step_dir(planned.name)
            if step.result.exists():
                continue
            step.stop.unlink(missing_ok=True)
            write_files(run, planned)
            batch = executor(plan, planned, cluster)
            batch.after = "?".join(f"afterok:{job}" for job in jobs[-1].ids) if jobs else None
            jobs.append(_submit_stage(step, batch, jobs, cluster))
    return jobs


def _carried() -> dict[str, str]:
    return {name: os.environ[name] for name in os.environ if CARRIED.fullmatch(name) and not names_secret(name)}


def refuse_twice(run: RunDir) -> None:
    """UserError where jobs of the run wait or work."""
    alive = [entry for entry in queue.read_queue([run]).values() if entry.alive]
    if alive:
        ids = ", ".join(entry.id for entry in alive)
        raise UserError(
            f"{run.path.name} is in the queue already (job {ids})",
            f"watch it with `ftlaunch status {run.path}`, end it with `ftlaunch cancel {run.path}`",
        )


def _submit_stage(step: StepDir, batch: Batch, before: Sequence[Job], cluster: Cluster) -> Job:
    """Submit a stage's job, and those that wait to take over from it. UserError where sbatch refuses one."""
    after = before[-1].id if before else None
    ids: list[str] = []
    try:
        for _ in range(1 + (cluster.successors if cluster.restart == "successor" else 0)):
            batch.after = ",".join(f"afternotok:{id}" for id in ids) or batch.after
            ids.append(batch.submit(job_entry.run_stage, str(step.path)).job_id)
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        queue.cancel([*(job for one in before for job in one.ids), *ids], cluster)
        said = REASON.findall(str(error)) or [str(error)]
        raise UserError(
            f"{step.name} cannot be submitted: {said[0]}",
            "mend the cluster's profile or the recipe; remove the run folder and run again",
        ) from error
    job = Job(id=ids[0], submitted=time.time(), after=after, successors=ids[1:])
    write_json(step.job, job)
    return job


@contextmanager
def _private() -> Generator[None]:
    """What is written meanwhile can be read by its owner only: submitit's calls are pickles, which run code."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def _leading_to(cluster: Cluster) -> Generator[None]:
    """With SLURM's commands led to a cluster, and not taken for a step of the job that this may itself run in."""
    with clean_env():
        before = dict(os.environ)
        os.environ.update(queue.environment(cluster))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)
