"""What the one task that a stage's SLURM job has on each node does: run the stage's processes there, see to the rest.

The first node leads: it makes the attempt, tells the others where to meet, and decides what becomes of the job.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import msgspec
from msgspec import Struct
from submitit.core.job_environment import JobEnvironment
from submitit.slurm.slurm import SlurmJobEnvironment

from ftlaunch.backend import supervisor, watchdog
from ftlaunch.backend.slurm import rendezvous, requeue, restart_policy
from ftlaunch.backend.slurm.restart_policy import Ended
from ftlaunch.backend.watchdog import HangWatch, RankState
from ftlaunch.cluster import queue
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import BAD_INPUT, DONE, STAGE_FAILED, STOPPED, UserError
from ftlaunch.plan import launch_config
from ftlaunch.plan.plan import PlannedStep
from ftlaunch.processes.outcome import (
    Done,
    Failure,
    Outcome,
    Stopped,
    describe_failure,
    name_cause,
    read_outcome,
    tell_death,
    tell_signal,
)
from ftlaunch.processes.signals import Warnings
from ftlaunch.recipe import Training
from ftlaunch.run.files import write_atomic, write_json
from ftlaunch.run.layout import CANCEL, REQUEUE, Attempt, RunDir, StepDir
from ftlaunch.safety import trust
from ftlaunch.safety.redact import redact_output
from ftlaunch.watch import progress, runs
from ftlaunch.watch.status import newest_checkpoint

MEET_SECONDS = 120.0
"""The other nodes wait so long for the first one's word."""
VERDICT_SECONDS = 45.0
"""The first node waits so long to hear how the others ended: longer than ranks that hang are left alone."""
NOTIFY_SECONDS = 60.0
POLL_SECONDS = 0.2
SIGNALLED = 128
"""srun's exit code is this and the number of the signal that has ended a task."""


class Start(Struct, frozen=True, kw_only=True):
    """The first node's word to the others."""

    attempt: int | None
    """None: there is nothing to do."""
    address: str | None
    port: int | None


class Verdict(Struct, frozen=True, kw_only=True):
    """How the processes of one node ended."""

    exit_code: int
    killed: Failure | None
    """What ended a rank from outside, if anything did."""
    ranks: list[RankState] = []
    """What its ranks were at, where the attempt was found to hang."""


def run_stage(folder: str) -> None:
    """Run the stage in a folder as the task of this node, and leave with the code that SLURM is to see."""
    redact_output()
    trust.write_for_ourselves()
    warnings = Warnings()
    warnings.listen()  # instead of submitit, which would requeue at once and in the middle of a step
    task = _Task(StepDir(Path(folder)), warnings)
    try:
        code = task.lead() if task.rank == 0 else task.follow()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = BAD_INPUT
    sys.exit(code)


def conclude_cut_off(step: StepDir, code: int) -> None:
    """See to the job of a stage whose tasks were killed before the first one could, called once they are gone.

    `code` is srun's: 128 and the number of the signal, where one has ended a task.
    """
    redact_output()
    task = _Task(step, Warnings())
    if step.result.exists() or (attempt := task.cut_off(code)) is None:
        return
    said = "its tasks were killed; what srun says of it is at the end of its job's output"
    stopped = step.stop_reason() not in (None, REQUEUE)
    outcome = Failure(rank=None, type="SIGKILL", message=said, log=str(step.jobs))
    task.warnings.heard = next((number for number in Warnings.NUMBERS if code == SIGNALLED + number), None)
    task.conclude(attempt, Stopped(reason="asked") if stopped else outcome)


@dataclass
class _Task:
    step: StepDir
    warnings: Warnings
    lost: list[str] = field(default_factory=list[str])
    """Nodes of an attempt that failed which are not heard of any more."""
    states: list[RankState] = field(default_factory=list[RankState])
    """What the ranks here were at, where they were found to hang."""
    slurm: JobEnvironment = field(default_factory=SlurmJobEnvironment)

    @cached_property
    def run(self) -> RunDir:
        return RunDir(self.step.path.parent)

    @cached_property
    def planned(self) -> PlannedStep:
        return next(planned for planned in runs.read_plan(self.run).steps if planned.name == self.step.name)

    @cached_property
    def cluster(self) -> Cluster:
        return queue.read_cluster(self.run)

    @cached_property
    def jobs(self) -> list[str]:
        """The stage's job and those that may take over from it; this one is among them."""
        job = queue.read_job(self.step)
        return job.ids if job and self.slurm.job_id in job.ids else [self.slurm.job_id]

    @property
    def rank(self) -> int:
        return self.slurm.node

    @cached_property
    def restart(self) -> int:
        """How often the stage was started before since it was submitted."""
        return int(os.environ.get("SLURM_RESTART_COUNT", "0")) + self.jobs.index(self.slurm.job_id)

    @cached_property
    def nodes(self) -> list[str]:
        """Names of the job's nodes. They must be as many as were planned: a shorter list would hang, not fail."""
        names = list(self.slurm.hostnames)
        planned = self.planned.step.parallel.nodes
        assert len(names) == planned, f"SLURM gave the nodes {names}, and {planned} were asked for"
        return names

    @cached_property
    def start_file(self) -> Path:
        return self.step.jobs / f"{self.slurm.job_id}.{self.restart}.json"

    # The first node

    def lead(self) -> int:
        if (code := self._refusal()) is not None:
            write_json(self.start_file, Start(attempt=None, address=None, port=None))
            return code
        self.step.stop.unlink(missing_ok=True)
        attempt = self.step.new_attempt()
        try:
            start = self._start(attempt)
            write_json(self.start_file, start)
            outcome = self._run(attempt, start)
        except UserError as error:
            outcome = _failure(error, attempt)
        return self.conclude(attempt, outcome)

    def cut_off(self, code: int) -> Attempt | None:
        """The attempt that nobody has concluded, made where no task came so far; None if there is none."""
        attempts = self.step.all_attempts()
        if attempts and not attempts[-1].ended.exists():
            return attempts[-1]
        return self.step.new_attempt() if code > SIGNALLED and not self.start_file.exists() else None

    def _refusal(self) -> int | None:
        """The code to leave with where there is nothing to start; None where there is."""
        if self.step.result.exists():
            return DONE  # requeued after its end
        if self.step.stop_reason() not in (None, REQUEUE):
            return STOPPED
        ahead = [step for step in self.run.step_dirs() if step.name < self.step.name and not step.result.exists()]
        given_up = self.cluster.restart == "successor" and (before := self._before()) and not before[-1].restarted
        # A job that waits to take over is also let go where the one that it would take over from was never started.
        return STAGE_FAILED if ahead or given_up else None

    def _start(self, attempt: Attempt) -> Start:
        if len(self.nodes) == 1:
            return Start(attempt=attempt.number, address=None, port=None)
        address = rendezvous.own_address(self.nodes[1:], self.cluster.interface)
        port = rendezvous.free_port(int(self.slurm.job_id), self.restart)
        return Start(attempt=attempt.number, address=address, port=port)

    def _run(self, attempt: Attempt, start: Start) -> Outcome:
        ended = self._attend(attempt, start)
        said = read_outcome(self.step, attempt)
        if isinstance(said, Done | Stopped):
            return said
        if ended.killed and not attempt.hung.exists():
            return Stopped(reason=CANCEL)
        mine = self._verdict(attempt, ended)
        others = self._verdicts(attempt)
        self.lost = [name for number, name in enumerate(self.nodes) if number and number not in others]
        if ended.killed:
            silent = msgspec.json.decode(attempt.hung.read_bytes(), type=float)
            return watchdog.failure(
                attempt, silent, [one for verdict in (mine, *others.values()) for one in verdict.ranks]
            )
        killed = [verdict.killed for verdict in (mine, *others.values()) if verdict.killed]
        said = said or tell_death(attempt, ended.exit_code)
        assert isinstance(said, Failure)
        if killed and restart_policy.is_echo(said):
            return killed[0]
        return name_cause(said, attempt)

    def _verdicts(self, attempt: Attempt) -> dict[int, Verdict]:
        """How the processes of the other nodes ended, by node; those that do not say so in time are left out.

        Where SLURM ends the job itself there is no time to wait.
        """
        waiting = {*range(1, len(self.nodes))}
        found: dict[int, Verdict] = {}
        deadline = time.monotonic() + VERDICT_SECONDS
        while waiting - {*found} and time.monotonic() < deadline and not self.warnings.heard:
            for number in waiting - {*found}:
                if attempt.verdict(number).exists():
                    found[number] = msgspec.json.decode(attempt.verdict(number).read_bytes(), type=Verdict)
            time.sleep(POLL_SECONDS)
        return found

    def conclude(self, attempt: Attempt, outcome: Outcome) -> int:
        """Write down how the attempt ended, put the job back into the queue where it is to go on, and say the code."""
        ended = self._judge(outcome)
        if overruled := self._overruled(attempt, ended):
            ended = msgspec.structs.replace(ended, restarted=False, reason=f"{ended.reason}; {overruled}")
        if isinstance(outcome, Failure):
            write_json(attempt.error, outcome)
            print(describe_failure(outcome), file=sys.stderr)
        write_json(attempt.ended, ended)
        print(f"{ended.cause}: {ended.reason}", file=sys.stderr)
        if ended.restarted and self.cluster.restart == "requeue":
            requeue.requeue(self.slurm.job_id, self.lost, self.cluster)
        if not ended.restarted and not overruled:
            self._notify(ended)
        return {"done": DONE, "failed": STAGE_FAILED}.get(ended.cause, STOPPED)

    def _overruled(self, attempt: Attempt, ended: Ended) -> str | None:
        """Why it is not for this task to say what becomes of the job; None where it is."""
        if not self._is_newest(attempt):
            return "a later attempt goes on without this one"
        if not ended.restarted or self.cluster.restart == "successor":
            return None
        state = requeue.job_state(self.run, self.slurm.job_id)
        return None if state == "RUNNING" else f"SLURM sees to the job itself, which is {state}"

    def _notify(self, ended: Ended) -> None:
        """Run the profile's line for the end of a run, whatever comes of it."""
        is_last = self.planned.name == runs.read_plan(self.run).steps[-1].name
        if self.cluster.notify is None or (ended.cause == "done" and not is_last):
            return
        state = "stopped" if ended.cause == "preempted" else ended.cause
        told = {"RUN": str(self.run.path), "STAGE": self.step.name, "STATE": state, "REASON": ended.reason}
        variables = os.environ | {f"FTLAUNCH_{name}": value for name, value in told.items()}
        try:
            subprocess.run(["bash", "-c", self.cluster.notify], env=variables, timeout=NOTIFY_SECONDS, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"notify: {error}", file=sys.stderr)

    def _is_newest(self, attempt: Attempt) -> bool:
        """Whether the stage has not been started again. A node that was cut off may come back to find that it has."""
        return self.step.all_attempts()[-1].number == attempt.number

    def _judge(self, outcome: Outcome) -> Ended:
        entries = progress.newest(self.step.metrics)
        ended = Ended(
            job=self.slurm.job_id,
            restart=self.restart,
            nodes=self.nodes,
            cause="done",
            step=entries[-1]["step"] if entries else None,
            checkpoint=newest_checkpoint(self.step),
            lost=self.lost,
            restarted=False,
            reason="the stage has its result",
        )
        return restart_policy.judge(
            outcome,
            ended,
            self._before(),
            self.cluster.most_restarts,
            warned=self.warnings.heard is not None,
            asked=self.step.stop_reason() not in (None, REQUEUE),
        )

    def _before(self) -> list[Ended]:
        """How earlier attempts since the stage was submitted ended, where they could say so."""
        files = [attempt.ended for attempt in self.step.all_attempts() if attempt.ended.exists()]
        ended = [msgspec.json.decode(file.read_bytes(), type=Ended) for file in files]
        return [one for one in ended if one.job in self.jobs]

    # The other nodes

    def follow(self) -> int:
        """Do as the first node says. Whatever becomes of the processes here, that one decides what it means."""
        if self.step.result.exists():
            return DONE
        start = self._hear_start()
        if start.attempt is None:
            return DONE
        attempt = Attempt(self.step.attempts / str(start.attempt), self.rank)
        ended = self._attend(attempt, start)
        write_json(attempt.verdict(self.rank), self._verdict(attempt, ended))
        return DONE

    def _hear_start(self) -> Start:
        deadline = time.monotonic() + MEET_SECONDS
        while not self.start_file.exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.nodes[0]} has not been heard of for {MEET_SECONDS:g} s",
                    f"look whether {self.step.jobs} is the same folder on all nodes",
                )
            time.sleep(POLL_SECONDS)
        return msgspec.json.decode(self.start_file.read_bytes(), type=Start)

    # All of them

    def _attend(self, attempt: Attempt, start: Start) -> supervisor.Ended:
        planned = self._as_here(start)
        watch = None
        if self.rank == 0 and isinstance(self.planned.step.stage, Training):
            watch = HangWatch(self.step, self.cluster.hang_after)
        poll = partial(self._poll, attempt, watch)
        return supervisor.attend(planned, self.step, attempt, supervisor.environment(planned), poll, Warnings.NUMBERS)

    def _verdict(self, attempt: Attempt, ended: supervisor.Ended) -> Verdict:
        outside = None if ended.forced or ended.killed else tell_signal(attempt, ended.exit_code)
        return Verdict(exit_code=ended.exit_code, killed=outside, ranks=self.states)

    def _as_here(self, start: Start) -> PlannedStep:
        """The planned step with this node's command and variables."""
        cluster = self.cluster
        head = (start.address, start.port) if start.address and start.port else None
        variables: dict[str, str] = msgspec.json.decode(self.run.environment.read_bytes(), type=dict[str, str])
        variables |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(cluster.signal_lead)}
        variables |= {"HF_HUB_OFFLINE": "1"} if cluster.offline else {}
        if head:
            variables |= _network(rendezvous.own_address([head[0]], cluster.interface), cluster.interface)
        return msgspec.structs.replace(
            self.planned,
            command=launch_config.on_machine(self.planned.command, self.rank, head),
            env=variables | cluster.environment | self.planned.env,
        )

    def _poll(self, attempt: Attempt, watch: HangWatch | None) -> supervisor.Order:
        """Where SLURM has warned of the end, ask all ranks to save; where they hang, find out at what."""
        if watch and (silent := watch.seconds_without_step()):
            write_json(attempt.hung, silent)
        if attempt.hung.exists():
            per_node = self.planned.step.parallel.procs_per_node
            mine = range(self.rank * per_node, (self.rank + 1) * per_node)
            self.states = watchdog.interrogate(attempt, self.nodes[self.rank], mine)
            return "kill"
        if self.warnings.heard and not self.step.stop.exists() and self._is_newest(attempt):
            write_atomic(self.step.stop, REQUEUE)
        return "kill" if self.step.stop_reason() == CANCEL else "go on"


def _network(address: str, interface: str | None) -> dict[str, str]:
    """Which interface the ranks talk over. gloo would otherwise take whatever the host's own name leads to."""
    name = interface or rendezvous.interface_of(address)
    return {f"{library}_SOCKET_IFNAME": name for library in ("GLOO", "NCCL", "TP")} if name else {}


def _failure(error: UserError, attempt: Attempt) -> Failure:
    return Failure(
        rank=None,
        type="UserError",
        message=error.message,
        remedy=error.remedy,
        log=str(attempt.launch_log),
        user_error=True,
    )
