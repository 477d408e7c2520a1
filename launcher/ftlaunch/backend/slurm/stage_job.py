"""The job of a stage: what it is, how an attempt of it is concluded, and how the stage then goes on."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import msgspec
from submitit.core.job_environment import JobEnvironment
from submitit.slurm.slurm import SlurmJobEnvironment

from ftlaunch import processes
from ftlaunch.backend import runs
from ftlaunch.backend.slurm import causes, messages, paths, queue, record, requeue, restart_policy
from ftlaunch.backend.slurm.messages import MadeBy
from ftlaunch.backend.slurm.restart_policy import AttemptRecord, read_ended
from ftlaunch.backend.status import newest_checkpoint
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import UserError
from ftlaunch.plan.plan import PlannedStage
from ftlaunch.processes.outcome import Failure, Outcome, Stopped, describe_failure
from ftlaunch.processes.signals import PreemptionSignals
from ftlaunch.run import progress
from ftlaunch.run.files import last_lines, write_json
from ftlaunch.run.layout import REQUEUE, Attempt, RunDir, StageDir
from ftlaunch.safety.redact import redact_output

SIGNALLED = 128
"""srun's exit code is this and the number of the signal that has ended a task."""
NOTIFY_SECONDS = 60.0


def finish_killed_job(stage_dir: StageDir, code: int) -> None:
    """See to the job of a stage whose tasks were killed before the first one could, called once they are gone.

    `code` is srun's: 128 and the number of the signal, where one has ended a task.
    """
    redact_output()
    stage_dir = record.stage_of(stage_dir, os.environ["SLURM_JOB_ID"])
    job = StageJob(stage_dir, PreemptionSignals())
    if stage_dir.result.exists() or (attempt := job.cut_off(code)) is None:
        return
    processes.end(attempt.path)  # ranks that were missed here, where SLURM finds processes by their parents
    output = paths.job_output(stage_dir, job.slurm.job_id)
    told = last_lines(output)
    # slurmstepd: "Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed."
    why = " for lack of memory (out of memory: memory_per_node)" if "oom_kill" in told else ""
    said = f"its tasks were killed{why}; what srun says of it is at the end of its job's output"
    stopped = stage_dir.stop_reason() not in (None, REQUEUE)
    outcome = Failure(rank=None, type="SIGKILL", message=said, traceback=told, log=str(output))
    job.warnings.heard = next((number for number in PreemptionSignals.NUMBERS if code == SIGNALLED + number), None)
    try:
        job.conclude(attempt, Stopped(reason="asked") if stopped else outcome, in_place=False)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)


@dataclass
class StageJob:
    """One start of a stage's job, seen from inside it."""

    stage_dir: StageDir
    warnings: PreemptionSignals
    lost: list[str] = field(default_factory=list[str])
    """Nodes of an attempt that failed which are not heard of any more."""
    starts: int = 0
    """How often the first node has spoken to the others inside this job."""
    slurm: JobEnvironment = field(default_factory=SlurmJobEnvironment)

    @cached_property
    def run(self) -> RunDir:
        return self.stage_dir.run

    @cached_property
    def planned(self) -> PlannedStage:
        return next(planned for planned in runs.read_plan(self.run).stages if planned.name == self.stage_dir.name)

    @cached_property
    def cluster(self) -> Cluster:
        return queue.read_cluster(self.run)

    @cached_property
    def jobs(self) -> list[str]:
        """The stage's job and those that may take over from it; this one is among them."""
        return self._record.ids if self._record else [self.slurm.job_id]

    @cached_property
    def _record(self) -> queue.Job | None:
        """What is on record of this job; None where it is not the stage's."""
        job = queue.read_job(self.stage_dir)
        return job if job and self.slurm.job_id in job.ids else None

    def _attempts(self) -> list[Attempt]:
        """Those since the stage was submitted."""
        return self.stage_dir.all_attempts()[self._record.earlier if self._record else 0 :]

    @cached_property
    def made_by(self) -> MadeBy:
        # SLURM sets the variable from the first requeue on.
        return MadeBy(job=self.slurm.job_id, restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")), nodes=self.nodes)

    @property
    def restart(self) -> int:
        """How often the stage was started before since it was submitted, in this job or by another start of it."""
        queued = self.made_by.restart + self.jobs.index(self.slurm.job_id)
        return queued + sum(one.in_place for one in self._before())

    @cached_property
    def nodes(self) -> list[str]:
        """Names of the nodes that the stage runs on, of which there may be fewer than planned: then it is not started.

        Where a job is to hold nodes to spare, this is the place that leaves them out, and those that are lost.
        """
        return list(self.slurm.hostnames)[: self.planned.spec.parallel.nodes]

    @property
    def start_file(self) -> Path:
        return messages.start_file(self.stage_dir, self.made_by, self.starts)

    def cut_off(self, code: int) -> Attempt | None:
        """The attempt of this start of the job that nobody has concluded, made where no task came so far.

        None where there is none, and where the job is not the run's: another job's attempts are none of its business.
        """
        mine = [one for one in self._attempts() if messages.is_of(one, self.made_by)]
        if mine:
            return None if paths.ended(mine[-1]).exists() else mine[-1]
        # A code of up to 128 is a task's own, and a start file means that the first node has come so far as to speak.
        if code <= SIGNALLED or self.start_file.exists() or not record.is_on_record(self.stage_dir, self.slurm.job_id):
            return None
        return self.stage_dir.new_attempt(made_by=self.made_by)

    def finish_killed_job(self) -> None:
        """Say how earlier attempts ended whose own jobs could not: their first node was lost, or had no time to."""
        for attempt in self._attempts():
            if paths.ended(attempt).exists() or messages.is_of(attempt, self.made_by):
                continue
            if (made_by := messages.read_made_by(attempt)) is None:
                continue
            cause, reason, lost = "preempted", "saved", list[str]()
            if failure := causes.of_cut_off(attempt, self.nodes):
                cause = "lost" if failure.type == causes.LOST else "failed"
                lost = causes.silent_nodes(attempt, made_by) if cause == "lost" else []
                reason = causes.describe(failure, made_by.nodes, [], self.planned.spec.parallel)
                write_json(attempt.error, failure)
            started = {"job": made_by.job, "restart": made_by.restart, "nodes": made_by.nodes}
            ended = msgspec.structs.replace(self._as_done(), **started, cause=cause, lost=lost, restarted=True)
            reason = f"{reason}; {restart_policy.GOES_ON}"
            write_json(paths.ended(attempt), msgspec.structs.replace(ended, reason=reason))

    def conclude(self, attempt: Attempt, outcome: Outcome, *, in_place: bool = True) -> AttemptRecord:
        """Write down how the attempt ended, then see that the stage goes on where it is to.

        `in_place`: whether it may go on inside this job, for which neither queue nor controller is needed.
        """
        ended = self._decide_restart(outcome)
        if isinstance(outcome, Failure):
            print(describe_failure(outcome), file=sys.stderr)
        # A node that was cut off comes back late, and sees the others lost.
        if read_ended(attempt) is not None:
            return _given_up(ended, "the attempt that follows has concluded it")
        if isinstance(outcome, Failure):
            write_json(attempt.error, outcome)
        # A silent node may be dead, and a job that was warned ends soon: neither is fit for a restart in place.
        all_answer = isinstance(outcome, Failure) and not self.lost and not self.warnings.heard
        if not self._is_newest(attempt):
            ended = _given_up(ended, "a later attempt goes on without this one")
        elif ended.restarted and in_place and all_answer:
            ended = msgspec.structs.replace(ended, in_place=True)
        write_json(paths.ended(attempt), ended)  # first of all: the controller may be away for longer than this lives
        print(f"{ended.cause}: {ended.reason}", file=sys.stderr)
        if ended.restarted and not ended.in_place and self.cluster.restart == "requeue":
            ended = self._go_back(attempt, ended)
        elif not ended.restarted and self._is_newest(attempt):
            is_last = self.planned.name == runs.read_plan(self.run).stages[-1].name
            notify(self.cluster, self.stage_dir, ended, is_last=is_last)
        return ended

    def _go_back(self, attempt: Attempt, ended: AttemptRecord) -> AttemptRecord:
        """Put the job back into the queue, which ends this process; come back, with the reason, where it cannot be."""
        try:
            state = requeue.job_state(self.run, self.slurm.job_id)
            # In any other state SLURM is ending or requeueing the job by itself.
            if state == "RUNNING":
                requeue.requeue(self.slurm.job_id, self.lost, self.cluster)
                return ended
            ended = _given_up(ended, f"SLURM sees to the job itself, which is {state}")
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            ended = _given_up(ended, f"it could not be put back into the queue: {error.message}")
        write_json(paths.ended(attempt), ended)
        print(f"{ended.cause}: {ended.reason}", file=sys.stderr)
        return ended

    def _is_newest(self, attempt: Attempt) -> bool:
        """Whether the stage has not been started again. A node that was cut off may come back to find that it has."""
        return self.stage_dir.all_attempts()[-1].number == attempt.number

    def _as_done(self) -> AttemptRecord:
        """How an attempt of this start has ended that has come to the result."""
        entries = progress.newest(self.stage_dir.metrics)
        return AttemptRecord(
            job=self.made_by.job,
            restart=self.restart,
            nodes=self.nodes,
            cause="done",
            step=entries[-1]["step"] if entries else None,
            checkpoint=newest_checkpoint(self.stage_dir),
            lost=self.lost,
            restarted=False,
            reason="the stage has its result",
        )

    def _decide_restart(self, outcome: Outcome) -> AttemptRecord:
        died_of = ""
        if isinstance(outcome, Failure):
            died_of = causes.describe(outcome, self.nodes, self.lost, self.planned.spec.parallel)
        return restart_policy.decide_restart(
            outcome,
            self._as_done(),
            self._before(),
            self.cluster.most_restarts,
            warned=self.warnings.heard is not None,
            asked=self.stage_dir.stop_reason() not in (None, REQUEUE),
            died_of=died_of,
        )

    def _before(self) -> list[AttemptRecord]:
        """How earlier attempts since the stage was submitted ended, where they could say so."""
        ended = [read_ended(attempt) for attempt in self._attempts()]
        return [one for one in ended if one is not None and one.job in self.jobs]


def _given_up(ended: AttemptRecord, why: str) -> AttemptRecord:
    """How an attempt ended that this job does not go on from after all."""
    what = restart_policy.what_happened(ended.reason)
    return msgspec.structs.replace(ended, restarted=False, in_place=False, reason=f"{what}; {why}")


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
