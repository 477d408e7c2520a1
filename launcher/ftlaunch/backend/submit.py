"""Stages as SLURM jobs: submitit writes the batch script of each and hands it over, one after the other's success."""

import os
import re
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env
from submitit.slurm.slurm import SlurmExecutor

from ftlaunch.backend import on_node
from ftlaunch.backend.prepare import write_files
from ftlaunch.cluster import Cluster, seconds
from ftlaunch.errors import UserError
from ftlaunch.plan import Plan, PlannedStep
from ftlaunch.processes import lock
from ftlaunch.recipe import Merge
from ftlaunch.redact import names_secret
from ftlaunch.rundir import RunDir, StepDir, write_json
from ftlaunch.watch import queue
from ftlaunch.watch.queue import Job

EXPORTED = ("HOME", "PATH", "USER", "LOGNAME", "LANG", "SLURM_CONF")
"""What a job has of the submitting shell. SLURM keeps and shows it, so nothing that may be secret is among it."""
CARRIED = re.compile(
    r"(HF|HUGGING_FACE|TRANSFORMERS|TOKENIZERS|TORCH|TRITON|NCCL|GLOO|OMP|MKL|CUDA|DS|ACCELERATE|XDG)_[A-Z0-9_]+"
    r"|LD_LIBRARY_PATH|(https?|no)_proxy|(HTTPS?|NO)_PROXY"
)
"""Variables that matter to the stages' processes, but for secrets. They travel in a file of the run's folder."""
REASON = re.compile(r"^sbatch: (?:error: )?(.+)$", re.MULTILINE)


class _Batch(SlurmExecutor):
    """submitit's executor, which can also write its script where there is no SLURM."""

    after: str | None = None
    """Job that must have succeeded first."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def text(self) -> str:
        return self._make_submission_file_text(self._submitit_command_str, "")

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        dependency = [f"--dependency=afterok:{self.after}"] if self.after else []
        return ["sbatch", *dependency, str(submission_file_path)]


class Request(Struct, frozen=True, kw_only=True):
    """What SLURM is asked for on behalf of a stage."""

    script: str
    """The batch script, to the byte as it is submitted."""
    price: str
    """What it may use up at most."""


def request(plan: Plan, planned: PlannedStep, cluster: Cluster) -> Request:
    """What SLURM will be asked for. Nothing is looked up, so no SLURM need be here."""
    text = _executor(Path(plan.run_dir), planned, cluster).text()
    return Request(script=text, price=_price(planned, cluster))


def _price(planned: PlannedStep, cluster: Cluster) -> str:
    """nodes × GPUs × time limit, of one start and of all that there may be."""
    parallel = planned.step.parallel
    limit = cluster.resources(planned.name.partition("-")[2]).time_limit or cluster.time_limit
    gpus = parallel.procs_per_node if _gpus(planned, cluster) else 0
    hours = parallel.nodes * (gpus or 1) * seconds(limit) / 3600
    unit = "GPU" if gpus else "node"
    size = f"{parallel.nodes} node{'s' if parallel.nodes > 1 else ''}{f' × {gpus} GPUs' if gpus else ''} × {limit}"
    return f"{size} = {hours:.3g} {unit}-hours a start, {cluster.max_restarts + 1} starts at most"


def _executor(run_dir: Path, planned: PlannedStep, cluster: Cluster) -> _Batch:
    executor = _Batch(run_dir / planned.name / "jobs")
    executor.update_parameters(**_parameters(run_dir, planned, cluster))
    return executor


def _parameters(run_dir: Path, planned: PlannedStep, cluster: Cluster) -> dict[str, Any]:
    kind = planned.name.partition("-")[2]
    resources = cluster.resources(kind)
    options: dict[str, Any] = {
        "job_name": f"{planned.step.name}/{planned.name}",
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "exclude": ",".join(cluster.exclude) or None,
        "nodes": planned.step.parallel.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": resources.cpus_per_node,
        "wckey": None,
        "signal_delay_s": cluster.signal_lead,
        "stderr_to_stdout": True,
        "setup": list(cluster.setup) or None,
        "srun_args": _srun(resources.cpus_per_node, cluster),
        "additional_parameters": _flags(run_dir, planned, cluster),
    }
    return {key: value for key, value in options.items() if value is not None or key == "wckey"}


def _srun(cpus: int | None, cluster: Cluster) -> list[str]:
    """One failed task ends the others; the CPUs are handed on, which srun does not do by itself since 22.05."""
    handed_on = [f"--cpus-per-task={cpus}"] if cpus else []
    return ["--kill-on-bad-exit=1", "--wait=60", "--export=ALL", *handed_on, *cluster.srun]


def _flags(run_dir: Path, planned: PlannedStep, cluster: Cluster) -> dict[str, Any]:
    resources = cluster.resources(planned.name.partition("-")[2])
    flags: dict[str, Any] = {
        "chdir": str(run_dir),
        "export": ",".join(EXPORTED),
        "kill-on-invalid-dep": "yes",
        "requeue": True,
        "time": resources.time_limit,
    }
    if resources.memory_per_node:
        flags["mem"] = resources.memory_per_node
    flags |= _gpus(planned, cluster)
    return flags | {key: value for key, value in cluster.sbatch.items() if value is not False}


def _gpus(planned: PlannedStep, cluster: Cluster) -> dict[str, str]:
    style, _, kind = cluster.gpus.partition(":")
    if style == "none" or planned.step.parallel.device == "cpu" or isinstance(planned.step.stage, Merge):
        return {}
    count = f"{f'{kind}:' if kind else ''}{planned.step.parallel.procs_per_node}"
    return {"gres": f"gpu:{count}"} if style == "gres" else {"gpus-per-node": count}


def submit(run: RunDir, plan: Plan) -> list[Job]:
    """Submit the unfinished stages, each to start when the one before has succeeded, and return their jobs in order.

    UserError where the run still has jobs, or where sbatch refuses one: then none of them is left in the queue.
    """
    held = lock.take(run)
    try:
        refuse_twice(run)
        return _submit_all(run, plan, queue.read_cluster(run))
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
            executor = _executor(run.path, planned, cluster)
            executor.after = jobs[-1].id if jobs else None
            jobs.append(_submit_one(step, executor, jobs, cluster))
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


def _submit_one(step: StepDir, executor: _Batch, before: Sequence[Job], cluster: Cluster) -> Job:
    try:
        submitted = executor.submit(on_node.run_stage, str(step.path))
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        queue.cancel([job.id for job in before], cluster)
        said = REASON.findall(str(error)) or [str(error)]
        raise UserError(
            f"{step.name} cannot be submitted: {said[0]}",
            "mend the cluster's profile or the recipe; remove the run folder and run again",
        ) from error
    job = Job(id=submitted.job_id, submitted=time.time(), after=executor.after)
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
