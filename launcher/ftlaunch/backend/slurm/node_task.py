"""What the one task that a stage's SLURM job has on each node does: run the stage's processes there, see to the rest.

The first node leads: it makes the attempt, tells the others where to meet, and decides what becomes of the job.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from ftlaunch.backend import runs, supervisor, watchdog
from ftlaunch.backend.slurm import carried, paths, record, rendezvous, restart_policy, submit
from ftlaunch.backend.slurm.messages import HeadNotice, NodeReport, read_verdict
from ftlaunch.backend.slurm.restart_policy import AttemptRecord
from ftlaunch.backend.slurm.stage_job import StageJob
from ftlaunch.backend.watchdog import HangWatch, RankState
from ftlaunch.errors import BAD_INPUT, DONE, STAGE_FAILED, STOPPED, UserError
from ftlaunch.plan import launch_config
from ftlaunch.plan.plan import PlannedStage
from ftlaunch.processes import guard, outcome
from ftlaunch.processes.outcome import Done, Failure, Outcome, Stopped
from ftlaunch.processes.signals import PreemptionSignals
from ftlaunch.recipe.stages import Training
from ftlaunch.run.files import write_atomic, write_first, write_json
from ftlaunch.run.layout import CANCEL, REQUEUE, Attempt, RunDir, StageDir
from ftlaunch.safety import trust
from ftlaunch.safety.redact import redact_output

MEET_SECONDS = 240.0
"""The other nodes wait so long for the first one's first word: sbatch waits two minutes for room in a full queue."""
VERDICT_SECONDS = 45.0
"""The first node waits so long to hear how the others ended: longer than ranks that hang are left alone."""
POLL_SECONDS, MOST_POLL_SECONDS = 0.2, 1.0
REPORT_SECONDS = 30.0
"""The job stays so long for a report at most: 60 s after the other nodes' tasks have left, srun would end this one."""


def run_stage(folder: str) -> None:
    """Run the stage in a folder as the task of this node, and leave with the code that SLURM is to see."""
    stage_dir = record.stage_of(StageDir(Path(folder)), os.environ["SLURM_JOB_ID"])
    task = NodeTask(stage_dir, PreemptionSignals())
    code = run_task(task)
    if task.rank == 0 and (code == STAGE_FAILED or runs.finished(task.run)):
        _leave_report(task.run)
    sys.exit(code)


def _leave_report(run: RunDir) -> None:
    """Have the run's report and cards written: nobody else is there when the run ends."""
    # In a process of its own: whatever becomes of a page, the job ends with the code of its stage.
    command = [sys.executable, "-P", "-m", "ftlaunch.report.at_end", str(run.path)]
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, check=False, timeout=REPORT_SECONDS)


def run_task(task: "NodeTask") -> int:
    """Do what a task does, for one stage after another where its job takes over what follows; its code."""
    redact_output()
    trust.write_for_ourselves()
    task.warnings.listen()  # instead of submitit, which would requeue at once and in the middle of a step
    try:
        code = task.attend()
        while code == DONE and task.following is not None:
            task = type(task)(task.run.stage_dir(task.following), task.warnings)
            code = task.attend()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = BAD_INPUT
    return code


@dataclass
class NodeTask(StageJob):
    """A node's part in a stage's job."""

    states: list[RankState] = field(default_factory=list[RankState])
    """What the ranks here were at, where they were found to hang."""
    following: str | None = None
    """The stage that the job takes over once this one is done."""

    @property
    def rank(self) -> int:
        return self.slurm.node

    @property
    def here(self) -> str:
        """This node's name."""
        return self.nodes[self.rank]

    @property
    def meeting(self) -> int:
        """A number by which jobs that share nodes choose different ports."""
        return int(self.slurm.job_id)

    def attend(self) -> int:
        """See the stage to its end, as this node does it, and say the code that SLURM is to see."""
        return self.run_as_head() if self.rank == 0 else self.run_as_worker()

    # The first node

    def run_as_head(self) -> int:
        """Start the stage, again inside the job while that is worth it, and say the code that SLURM is to see."""
        try:
            if (code := self._refusal()) is not None:
                self.following = self._take_over() if code == DONE else None
                return code
            # What is left here says "requeue", or `_refusal` had returned: ranks would leave at their first step.
            self.stage_dir.stop.unlink(missing_ok=True)
            self._submit_rest()
            while (ended := self._attempt()).in_place:
                self.starts += 1
            if ended.cause == "done":
                self.following = self._take_over()
            return {"done": DONE, "failed": STAGE_FAILED}.get(ended.cause, STOPPED)
        finally:
            self._let_go()

    def _submit_rest(self) -> None:
        """Submit the stages that the queue had no room for; this job's own end makes room for one more."""
        try:
            submit.submit_rest(self.run, self.stage_dir)
        except UserError as error:
            print(f"the next stage is not submitted: {error}", file=sys.stderr)

    def _take_over(self) -> str | None:
        """The next stage, where the queue has no room for it as long as this job is in it, and it fits in here."""
        return submit.take_over(self.run, self.stage_dir, self.slurm.job_id)

    def _let_go(self) -> None:
        """Have the other nodes leave, which wait for what comes next, or turn to the stage that follows."""
        # Workers have read this number's notice already, unless the start failed before it was written.
        if self.start_file.exists():
            self.starts += 1
        write_json(self.start_file, HeadNotice(attempt=None, following=self.following))

    def _attempt(self) -> AttemptRecord:
        """One start of the stage's processes on all nodes, concluded."""
        self.lost, self.states = [], []
        self.finish_killed_job()
        attempt = self.stage_dir.new_attempt(made_by=self.made_by)
        try:
            start = self._start(attempt)
            write_json(self.start_file, start)
            found = self._run(attempt, start)
        except UserError as error:
            found = _failure(error, attempt)
        return self.conclude(attempt, found)

    def _refusal(self) -> int | None:
        """The code to leave with where there is nothing to start; None where there is."""
        if self.stage_dir.result.exists():
            return DONE  # requeued after its end
        if not self._is_on_record():
            raise UserError(
                f"job {self.slurm.job_id} is not on record: its submission was cut short, or another took its place",
                f"where nothing else of the run is in the queue: ftlaunch resume {self.run.in_shell}",
            )
        if self.stage_dir.stop_reason() not in (None, REQUEUE):
            return STOPPED
        unfinished = [
            stage_dir
            for stage_dir in self.run.stage_dirs()
            if stage_dir.name < self.stage_dir.name and not stage_dir.result.exists()
        ]
        given_up = self.cluster.restart == "successor" and (before := self._before()) and not before[-1].restarted
        # A successor leaves too if the job before it was given up, or never started because an earlier stage failed.
        return STAGE_FAILED if unfinished or given_up else None

    def _is_on_record(self) -> bool:
        return record.is_on_record(self.stage_dir, self.slurm.job_id, lambda: self.warnings.heard is not None)

    def _start(self, attempt: Attempt) -> HeadNotice:
        if self.restart > (most := self.cluster.most_restarts):  # as SLURM does where a node dies again and again
            message = f"SLURM has put the job back into the queue, and {most} restarts are allowed (max_restarts)"
            raise UserError(message, "look why its nodes die (sacct, sinfo -R); go on with `ftlaunch resume`")
        planned = self.planned.spec.parallel.nodes
        if len(self.nodes) < planned:  # ranks would wait for those that are missing
            message = f"the job has {len(self.nodes)} of the {planned} nodes that were asked for: it was changed"
            raise UserError(message, f"ftlaunch resume RUN --nodes {len(self.nodes)}, or as it is for {planned}")
        if len(self.nodes) == 1:
            return HeadNotice(attempt=attempt.number, address=None, port=None)
        address = rendezvous.own_address(self.nodes[1:], self.cluster.interface)
        port = rendezvous.free_port(self.meeting, self.restart)
        return HeadNotice(attempt=attempt.number, address=address, port=port)

    def _run(self, attempt: Attempt, start: HeadNotice) -> Outcome:
        ended = self._attend(attempt, start)
        said = outcome.read_outcome(self.stage_dir, attempt)
        if isinstance(said, Done | Stopped):
            return said
        # `_poll` kills a hung attempt or a cancelled one.
        if ended.killed and not paths.hung(attempt).exists():
            return Stopped(reason=CANCEL)
        mine = self._verdict(attempt, ended)
        others = self._verdicts(attempt)
        self.lost = [name for number, name in enumerate(self.nodes) if number and number not in others]
        if ended.killed:
            silent = msgspec.json.decode(paths.hung(attempt).read_bytes(), type=float)
            return watchdog.failure(
                attempt, silent, [one for verdict in (mine, *others.values()) for one in verdict.ranks]
            )
        killed = [verdict.killed for verdict in (mine, *others.values()) if verdict.killed]
        said = said or outcome.tell_death(attempt, ended.exit_code)
        assert isinstance(said, Failure)
        # Peers of a killed rank report broken connections; the kill is the cause.
        if killed and restart_policy.is_peer_error(said):
            return killed[0]
        return outcome.name_cause(said, attempt)

    def _verdicts(self, attempt: Attempt) -> dict[int, NodeReport]:
        """How the processes of the other nodes ended, by node; those that do not say so in time are left out.

        Where SLURM ends the job itself there is no time to wait.
        """
        waiting = {*range(1, len(self.nodes))}
        found: dict[int, NodeReport] = {}
        deadline = time.monotonic() + VERDICT_SECONDS
        while waiting - {*found} and time.monotonic() < deadline and not self.warnings.heard:
            found |= {number: told for number in waiting - {*found} if (told := read_verdict(attempt, number))}
            time.sleep(POLL_SECONDS)
        return found

    # The other nodes

    def run_as_worker(self) -> int:
        """Do as the first node says. Whatever becomes of the processes here, that one decides what it means."""
        while (start := self._hear_start()).attempt is not None:
            if self.rank >= len(self.nodes):  # a spare node stays: if it left, srun --wait would end the others
                self.starts += 1
                continue
            attempt = Attempt(self.stage_dir.attempts / str(start.attempt), self.rank)
            self.states = []
            try:
                verdict = self._verdict(attempt, self._attend(attempt, start))
            except UserError as error:
                failure = _failure(error, attempt)
                write_first(attempt.error, msgspec.structs.replace(failure, message=f"{self.here}: {failure.message}"))
                verdict = NodeReport(exit_code=BAD_INPUT, killed=None)
            write_json(paths.report(attempt, self.rank), verdict)
            self.starts += 1
        self.following = start.following
        # DONE even after a failure: --kill-on-bad-exit would end the first node's task while it decides.
        return DONE

    def _hear_start(self) -> HeadNotice:
        """The first node's next word. That one may take its time once it has spoken; srun ends this if it dies."""
        deadline = time.monotonic() + MEET_SECONDS
        pause = POLL_SECONDS
        while not self.start_file.exists():
            if self.warnings.heard == signal.SIGTERM:
                return HeadNotice(attempt=None)
            self.warnings.heard = None  # SIGUSR2 warns of the time limit, which the first node answers
            if self.starts == 0 and time.monotonic() > deadline and not record.is_cut_short(self.run):
                raise UserError(
                    f"{self.nodes[0]} has not been heard of for {MEET_SECONDS:g} s",
                    f"look whether {paths.jobs(self.stage_dir)} is the same folder on all nodes",
                )
            time.sleep(pause)
            pause = min(MOST_POLL_SECONDS, 1.2 * pause)
        return msgspec.json.decode(self.start_file.read_bytes(), type=HeadNotice)

    # All of them

    def _attend(self, attempt: Attempt, start: HeadNotice) -> supervisor.ExitInfo:
        planned = self._as_here(start)
        watch = None
        # Stages of other kinds take no optimizer steps, so their silence says nothing.
        if self.rank == 0 and isinstance(self.planned.spec.stage, Training):
            watch = HangWatch(self.stage_dir, self.cluster.hang_after)
        poll = partial(self._poll, attempt, watch)
        # SLURM signals every process of a step, and `accelerate launch` would die of SIGUSR2 if it did not ignore it.
        with guard.ended_with_this(attempt.path):
            return supervisor.supervise(
                planned, self.stage_dir, attempt, supervisor.environment(planned), poll, PreemptionSignals.NUMBERS
            )

    def _verdict(self, attempt: Attempt, ended: supervisor.ExitInfo) -> NodeReport:
        outside = None if ended.forced or ended.killed else outcome.tell_signal(attempt, ended.exit_code)
        return NodeReport(exit_code=ended.exit_code, killed=outside, ranks=self.states)

    def _as_here(self, start: HeadNotice) -> PlannedStage:
        """The planned step with this node's command and variables."""
        cluster = self.cluster
        head = (start.address, start.port) if start.address and start.port else None
        variables = carried.kept(self.run, cluster)
        # torch elastic kills ranks 30 s after it has passed SIGTERM on; a save may need all of signal_lead.
        variables |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(cluster.signal_lead)}
        if head:
            variables |= rendezvous.network_variables([head[0]], cluster.interface)
        return msgspec.structs.replace(
            self.planned,
            command=launch_config.on_machine(self.planned.command, self.rank, head),
            # The last one wins: neither shell nor profile may undo what the plan sets.
            env=variables | cluster.environment | self.planned.env,
        )

    def _poll(self, attempt: Attempt, watch: HangWatch | None) -> supervisor.Order:
        """Where SLURM has warned of the end, ask all ranks to save; where they hang, find out at what."""
        if watch and (silent := watch.poll()):
            write_json(paths.hung(attempt), silent)
        if paths.hung(attempt).exists():
            ranks = self.planned.spec.parallel.ranks_of(self.rank)
            self.states = watchdog.interrogate(attempt, self.here, ranks)
            return "kill"
        if self.warnings.heard and not self.stage_dir.stop.exists() and self._is_newest(attempt):
            write_atomic(self.stage_dir.stop, REQUEUE)
        return "kill" if self.stage_dir.stop_reason() == CANCEL else "go on"


def _failure(error: UserError, attempt: Attempt) -> Failure:
    return Failure(
        rank=None,
        type="UserError",
        message=error.message,
        remedy=error.remedy,
        log=str(attempt.launch_log),
        user_error=True,
    )
