"""A SLURM cluster as a place that runs are started in: each stage is a job. submitit is imported when jobs are."""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from ftlaunch.backend import runs
from ftlaunch.backend.driving import come_back
from ftlaunch.backend.folders import discard
from ftlaunch.backend.protocol import Backend, Foreseen, Say
from ftlaunch.backend.slurm import code_copy, jobs, paths, queue, reasons
from ftlaunch.backend.slurm.carried import carried, not_heeded
from ftlaunch.backend.slurm.queue import Entry
from ftlaunch.backend.status import RunStatus
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import INTERRUPTED, UserError
from ftlaunch.load import Loaded
from ftlaunch.plan.plan import Plan, make_plan
from ftlaunch.processes.outcome import Failure
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.rules import strategy
from ftlaunch.run.files import write_atomic, write_json
from ftlaunch.run.layout import CANCEL, STOP, RunDir, StageDir
from ftlaunch.tools import ToolOptions

WHERE_IT_WAITS = "jobs that wait leave as soon as they start; call this again when SLURM answers to have them go now"


class Slurm(Backend):
    """Runs whose stages are jobs. `profile` is called where it is needed: a run's may be of another version."""

    patience = 5.0
    """A controller is asked, which others need too."""
    one_by_one = False

    def __init__(self, profile: Callable[[], Cluster]) -> None:
        self._profile = profile

    @cached_property
    def cluster(self) -> Cluster:
        """The profile of the cluster. UserError where it cannot be read."""
        return self._profile()

    def check(self, loaded: Loaded) -> None:
        """RecipeError where a recipe was settled by this machine."""
        strategy.require_here(loaded)

    def plan(self, recipe: Recipe, folder: Path) -> Plan:
        """The plan of one run of a recipe; what its nodes compute with is not known here."""
        return make_plan(recipe, folder)

    def foresee(self, plan: Plan) -> Foreseen:
        """What stages cost, each one's batch script with what it may use up, and the variables that jobs are given."""
        from ftlaunch.backend.slurm.request import request
        from ftlaunch.plan.cost import costs

        if (said := not_heeded()) is not None:
            print(f"warning: {said}", file=sys.stderr)
        return Foreseen(
            costs=costs.on_cluster(plan.specs, self.cluster),
            requests={planned.name: request(plan, planned, self.cluster) for planned in plan.stages},
            variables=carried() | self.cluster.environment,
        )

    def require(self, plan: Plan, after: str | None) -> None:
        """UserError where a plan's jobs cannot be submitted from here, or where `after` names nothing to wait for."""
        from ftlaunch.backend.slurm import submit

        submit.require_fit(plan, self.cluster)
        dependency(after, self.cluster)

    def claim(self, run: RunDir, source: Path | None = None) -> None:
        """Write the profile that the run's jobs are submitted by and, of a run with a recipe's file, the code."""
        write_json(paths.cluster(run), self.cluster)
        if source is not None:
            code_copy.take(run, source, runs.read_plan(run).recipe)

    def release(self, run: RunDir) -> None:
        """Remove the profile, by which a run is known to be a cluster's."""
        paths.cluster(run).unlink()

    def require_rest(self, run: RunDir) -> None:
        """UserError where jobs of the run wait or work or are being submitted."""
        from ftlaunch.backend.slurm import submit

        submit.require_rest(run)

    def start(self, run: RunDir, *, detach: bool, after: str | None, fresh: bool) -> None:  # noqa: ARG002
        """Submit the unfinished stages, which then go on by themselves."""
        from ftlaunch.backend.slurm import submit

        if job := os.environ.get("SLURM_JOB_ID"):
            print(
                f"you are in job {job}: this submits other jobs; without --cluster its nodes are used", file=sys.stderr
            )
        try:
            submitted = submit.submit(run, runs.read_plan(run), dependency(after, self.cluster))
        except UserError as error:
            # A job of a submission on record may still start, and learns from this folder that it must leave.
            if fresh and not paths.submission(run).exists():
                discard(run)
                error.remedy = (
                    error.remedy.partition(submit.OR_RESUME)[0] + "; run it again then: nothing is left of it"
                )
            raise
        ids = ", ".join(f"job {job.id}" for job in submitted)
        print(f"{run.path.name} is submitted: {ids}. Come back with", file=sys.stderr)
        print(come_back(run))
        _warn_of_waiting(run)

    def conduct(self, runs: Mapping[str, RunDir], at_once: int | None, say: Say) -> int:
        """Submit runs that have not finished, at most so many at once, and wait for all of them; the exit code."""
        from ftlaunch.backend.slurm.lanes import conduct

        try:
            return conduct([*runs.values()], self.cluster, at_once, say)
        except KeyboardInterrupt:
            say("what is in the queue goes on; the same command waits for it again")
            return INTERRUPTED

    def states(self, runs: Sequence[RunDir]) -> list[RunStatus]:
        """How runs stand, in their order; SLURM is asked once for all of those that are not finished."""
        return jobs.states(runs)

    def is_over(self, run: RunDir) -> bool:
        """Whether none of a run's jobs waits or works. False where SLURM does not answer."""
        return jobs.is_over(run)

    def last_words(self, stage_dir: StageDir) -> Failure | None:
        """What a stage's newest job died of, where that left it no time to write it down."""
        answer = queue.ask([stage_dir.run])[0]
        return None if answer.silent is not None else jobs.last_words(stage_dir, answer.of(stage_dir))

    def ask_to_stop(self, run: RunDir) -> UserError | None:
        """Have the stage that runs save and leave, and jobs that wait leave the queue; an error if out of reach.

        UserError where the stage that runs cannot be told.
        """
        # Before the queue is asked: a job that starts in between finds the file and leaves.
        unwritten = _write(run.unfinished()[:1], STOP)
        # As squeue's answer may be old: a job that has started meanwhile is to save.
        silent = _end(run, lambda entry: entry.state in queue.WAITING, "--state=PENDING")
        if unwritten:
            raise UserError(unwritten, "make room, or mend the disk; `ftlaunch cancel` ends the run without saving")
        said = f"{run.path.name} saves and leaves if it runs, but {silent}"
        return UserError(said, WHERE_IT_WAITS) if silent else None

    def cancel(self, run: RunDir) -> None:
        """End the run's jobs at once, those that wait for them included. UserError where SLURM could not be told."""
        unwritten = _write(run.unfinished(), CANCEL)
        silent = _end(run, lambda entry: entry.alive)
        if silent and unwritten:
            raise UserError(f"{unwritten}; and {silent}", "try again when SLURM answers")
        if silent:
            raise UserError(f"{run.path.name} is ended where it runs, but {silent}", WHERE_IT_WAITS)

    def call(self, options: ToolOptions) -> int:
        """Run a tool on a node of the cluster, and return its exit code."""
        from ftlaunch.backend.slurm import tool_job

        return tool_job.call(options, self.cluster)


def dependency(after: str | None, cluster: Cluster) -> str | None:
    """What --after means to sbatch: a job's number, or the last job of a run. UserError where it means nothing."""
    if after is None:
        return None
    is_job = re.fullmatch(r"\d+(_\d+)?", after)
    return queue.dependency_on_job(after, cluster) if is_job else queue.dependency_on(runs.find(after))


def _write(stage_dirs: list[StageDir], wish: str) -> str | None:
    """Leave a wish in stages. Says why where that cannot be done, which keeps nobody from asking SLURM."""
    for stage_dir in stage_dirs:
        try:
            write_atomic(stage_dir.stop, wish)
        except OSError as error:
            return f"{stage_dir.stop} cannot be written: {error.strerror}"
    return None


def _end(run: RunDir, wanted: Callable[[Entry], bool], *options: str) -> str | None:
    try:
        jobs = [entry.id for entry in queue.read_queue(run).values() if wanted(entry)]
        queue.cancel(jobs, queue.read_cluster(run), *options)
    except UserError as error:
        return error.message
    return None


def _warn_of_waiting(run: RunDir) -> None:
    """Say so at once where SLURM will not start a job as it is."""
    answer = queue.ask([run])[0]
    for stage_dir in run.stage_dirs():
        if (entry := answer.of(stage_dir)) and entry.state == "PENDING" and reasons.never_starts(entry.reason):
            print(f"warning: {stage_dir.name} {reasons.why_waiting(entry.reason)}", file=sys.stderr)
