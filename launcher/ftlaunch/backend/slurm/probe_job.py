"""The job with which `ftlaunch doctor` looks at nodes: submitted, started and set up exactly as a stage's own."""

import secrets
import time
from functools import cached_property
from pathlib import Path

import msgspec
from submitit.core.utils import FailedJobError, FailedSubmissionError

from ftlaunch.backend.slurm import entry, probe
from ftlaunch.backend.slurm.request import Batch, executor
from ftlaunch.backend.slurm.submit import leading_to, private
from ftlaunch.cluster import queue
from ftlaunch.cluster.queue import Job
from ftlaunch.cluster.vocabulary import Cluster, Resources
from ftlaunch.plan.plan import Plan, PlannedStep
from ftlaunch.recipe import Model, Optimizer, Parallel, Recipe, Sft
from ftlaunch.run import snapshot
from ftlaunch.run.files import sync_folder, write_atomic, write_json
from ftlaunch.run.layout import RunDir, StepDir
from ftlaunch.run.spec import Step
from ftlaunch.watch import jobs

STAGE = "01-sft"
TIME_LIMIT, SIGNAL_LEAD = "0:05:00", 10
PROBE_SECONDS, POLL_SECONDS = 300.0, 1.0
"""How long the probe may wait in the queue and run."""
GONE_SECONDS = 30.0


class ProbeJob:
    """A run of one stage in a folder of its own, whose tasks look at their nodes instead of training."""

    def __init__(self, folder: Path, cluster: Cluster, nodes: int) -> None:
        self.run_dir = RunDir(folder)
        self.cluster = cluster
        self.nodes = nodes
        self.step.jobs.mkdir(parents=True)
        write_json(self.run_dir.plan, self.plan)
        write_json(self.run_dir.cluster, cluster)
        snapshot.take_packages(self.run_dir)
        write_atomic(folder / probe.TOKEN, secrets.token_hex())

    @property
    def step(self) -> StepDir:
        return self.run_dir.step_dir(STAGE)

    @cached_property
    def plan(self) -> Plan:
        recipe = Recipe(name="doctor", model=Model(path="none"), stage=[Sft(data="none")])
        step = Step(
            name=recipe.name,
            stage=recipe.stage[0],
            model=recipe.model,
            adapter=recipe.adapter,
            optimizer=Optimizer(),
            parallel=Parallel(nodes=self.nodes),
            data={},
            seed=0,
            deterministic=False,
            world_size=self.nodes,
            training_hash="",
        )
        planned = PlannedStep(name=STAGE, step=step, files={}, command=[], env={}, notes={})
        return Plan(name=recipe.name, run_dir=str(self.run_dir.path), recipe=recipe, steps=[planned])

    def _batch(self, cluster: Cluster) -> Batch:
        return executor(self.plan, self.plan.steps[0], cluster)

    def is_admitted(self) -> tuple[bool, str]:
        """Whether SLURM would take a stage's batch script, and its words."""
        script = self.step.jobs / "asked.sh"
        write_atomic(script, self._batch(self.cluster).text())
        done = queue.call(["sbatch", "--test-only", str(script)], self.cluster)
        return done.returncode == 0, done.stderr.strip().removeprefix("sbatch: ")

    def run(self) -> str:
        """Have every node looked at, in a job that nothing is left of, and return what it said where one was not."""
        job: str | None = None
        try:
            with private(), leading_to(self.cluster):
                batch = self._batch(_for_a_moment(self.cluster))
                job = batch.submit(entry.run_probe, str(self.run_dir.path), self.cluster.interface).job_id
            write_json(self.step.job, Job(id=job, submitted=time.time()))
            return self._wait(job)
        except (FailedJobError, FailedSubmissionError) as error:
            return str(error)
        finally:
            if job is not None:
                self._end(job)

    def _wait(self, job: str) -> str:
        deadline = time.monotonic() + PROBE_SECONDS
        while time.monotonic() < deadline:
            sync_folder(self.run_dir.path)
            entry = queue.ask([self.run_dir])[0].entries.get(job)
            if len([*self.run_dir.path.glob("node*.json")]) == self.nodes:
                return ""
            if entry is None or not entry.alive:
                died = jobs.died_early(self.step, entry)
                return died.message if died else f"job {job} has ended: {entry.state if entry else 'unknown'}"
            time.sleep(POLL_SECONDS)
        return f"job {job} has not been done with for {PROBE_SECONDS:g} s"

    def _end(self, job: str) -> None:
        queue.cancel([job], self.cluster)
        deadline = time.monotonic() + GONE_SECONDS
        while time.monotonic() < deadline:
            entry = queue.ask([self.run_dir])[0].entries.get(job)
            if entry is None or not entry.alive:
                return
            time.sleep(POLL_SECONDS)


def _for_a_moment(cluster: Cluster) -> Cluster:
    """The profile with a short time limit, as the probe should soon find its place."""
    stages = {kind: _without_limit(resources) for kind, resources in cluster.stage.items()}
    return msgspec.structs.replace(cluster, time_limit=TIME_LIMIT, signal_lead=SIGNAL_LEAD, stage=stages)


def _without_limit(resources: Resources) -> Resources:
    return msgspec.structs.replace(resources, time_limit=None)
