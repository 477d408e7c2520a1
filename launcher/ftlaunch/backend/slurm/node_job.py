"""A job that does something else than a stage, on nodes that are asked for and set up exactly as a stage's are."""

import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError

from ftlaunch.backend.slurm import code_copy, jobs, paths, queue
from ftlaunch.backend.slurm.queue import Answer, Job
from ftlaunch.backend.slurm.request import Batch, executor
from ftlaunch.backend.slurm.submit import submitting_to
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import UserError
from ftlaunch.plan.plan import Plan, PlannedStage, make_specs
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.recipe.stages import Parallel, Sft, Stage
from ftlaunch.run.files import sync, write_atomic, write_json
from ftlaunch.run.layout import RunDir, StageDir

STAGE = "01-sft"
POLL_SECONDS = 1.0
GONE_SECONDS = 30.0


class NodeJob:
    """A run of one stage in a folder of its own, whose tasks call something else instead of training."""

    def __init__(self, folder: Path, cluster: Cluster, nodes: int, stage: Stage | None = None) -> None:
        self.run_dir = RunDir(folder)
        self.cluster = cluster
        self.nodes = nodes
        self.stage = stage or Sft(data="none", batch_size=nodes)
        self.id: str | None = None
        paths.jobs(self.stage_dir).mkdir(parents=True)
        write_json(self.run_dir.plan, self.plan)
        write_json(paths.cluster(self.run_dir), cluster)
        # The batch script puts this copy on PYTHONPATH, as a stage's does.
        code_copy.take_packages(self.run_dir)

    @property
    def stage_dir(self) -> StageDir:
        return self.run_dir.stage_dir(STAGE)

    @cached_property
    def plan(self) -> Plan:
        recipe = Recipe(
            name="ftlaunch",
            model=Model(path="none"),
            data={"none": Data(path="none")},
            parallel=Parallel(nodes=self.nodes),
            stage=[self.stage],
        )
        (spec,) = make_specs(recipe).values()
        planned = PlannedStage(name=STAGE, spec=spec, files={}, command=[], env={}, notes={})
        return Plan(name=recipe.name, run_dir=str(self.run_dir.path), recipe=recipe, stages=[planned])

    def _batch(self, cluster: Cluster) -> Batch:
        return executor(self.plan, self.plan.stages[0], cluster)

    def is_admitted(self) -> tuple[bool, str]:
        """Whether SLURM would take a stage's batch script, and its words."""
        script = paths.jobs(self.stage_dir) / "asked.sh"
        write_atomic(script, self._batch(self.cluster).text())
        done = queue.call(["sbatch", "--test-only", str(script)], self.cluster)
        return done.returncode == 0, done.stderr.strip().removeprefix("sbatch: ")

    def submit(self, function: Callable[..., None], *arguments: object, cluster: Cluster | None = None) -> None:
        """Have the job's tasks call a function; another profile's wishes may take the place of the own. UserError."""
        try:
            with submitting_to(self.cluster):
                self.id = self._batch(cluster or self.cluster).submit(function, *arguments).job_id
        except (FailedJobError, FailedSubmissionError) as error:
            raise UserError(f"the job cannot be submitted: {error}", "mend the profile") from error
        write_json(paths.job(self.stage_dir), Job(id=self.id, submitted=time.time()))

    @property
    def answer(self) -> Answer:
        """What SLURM says of the job."""
        return queue.ask([self.run_dir])[0]

    def wait(self, is_done: Callable[[], bool], seconds: float | None = None) -> str:
        """Wait until it is done with, and return what the job said where it ended without that."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while deadline is None or time.monotonic() < deadline:
            sync(self.run_dir.path)
            # SLURM is asked before the folder, so that an answer written just before the job's end counts.
            answer = self.answer
            if is_done():
                return ""
            entry = answer.entries.get(self.id or "")
            # Where SLURM does not answer, the job may go on all the same.
            if answer.silent is None and (entry is None or not entry.alive):
                died = jobs.died_early(self.stage_dir, entry)
                return died.message if died else f"job {self.id} has ended: {entry.state if entry else 'unknown'}"
            time.sleep(POLL_SECONDS)
        return f"job {self.id} has not been done with for {seconds:g} s"

    def end(self) -> None:
        """End what there is of the job, and wait until it is gone."""
        deadline = time.monotonic() + GONE_SECONDS
        # By what SLURM knows as ours: a site's own sbatch may have told a number that is no job of ours.
        while time.monotonic() < deadline:
            if not (alive := [entry.id for entry in self.answer.entries.values() if entry.alive]):
                return
            queue.cancel(alive, self.cluster)
            time.sleep(POLL_SECONDS)
