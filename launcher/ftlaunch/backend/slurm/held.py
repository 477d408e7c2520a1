"""Runs the stages of a written run, one after another, on nodes that its user holds by salloc or sbatch already."""

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct
from submitit.slurm.slurm import SlurmJobEnvironment

from ftlaunch import processes
from ftlaunch.backend import runs
from ftlaunch.backend.display import Display
from ftlaunch.backend.driving import Driven, StageDriver
from ftlaunch.backend.folders import write_files
from ftlaunch.backend.slurm import paths, queue
from ftlaunch.backend.slurm.messages import read_made_by
from ftlaunch.backend.slurm.restart_policy import AttemptRecord, read_ended
from ftlaunch.backend.status import RunStatus, StageStatus, measured, run_status
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import STAGE_FAILED, UserError
from ftlaunch.plan.plan import Plan, PlannedStage
from ftlaunch.processes import lock
from ftlaunch.processes.outcome import read_outcome
from ftlaunch.processes.signals import StopSignals
from ftlaunch.run.files import last_lines, read_json, write_atomic, write_json
from ftlaunch.run.layout import CANCEL, REQUEUE, STOP, Attempt, RunDir, StageDir
from ftlaunch.run.progress import MetricsTail, duration

POLL_SECONDS = 0.2
KILL_SECONDS = 30.0
"""Tasks may take so long to end their ranks where a kill is asked for."""
GONE_SECONDS, GONE_POLL_SECONDS = 60.0, 2.0
"""Tasks whose driver was killed may take so long to save and leave."""
SET_PARENT_DEATH_SIGNAL = 1
# SLURM_JOB_CPUS_PER_NODE reads "8(x2),4": eight CPUs on two nodes, four on one.
CPUS = re.compile(r"(\d+)(?:\(x\d+\))?")


@dataclass(frozen=True)
class Allocation:
    """Nodes that a job holds."""

    job: str
    nodes: list[str]
    cpus: int
    """CPUs of the node that has the fewest."""

    def __str__(self) -> str:
        return f"job {self.job} on {', '.join(self.nodes)}"


class HeldBy(Struct, frozen=True, kw_only=True):
    """held_by.json: the job that a run's driver is in. Its id alone proves nothing: SLURM gives ids again."""

    job: str
    nodes: str
    """Nodes of that job, in SLURM's short form."""


def allocation() -> Allocation | None:
    """The nodes of the SLURM job that this process runs in; None outside of any, and in a stage's own job."""
    job = os.environ.get("SLURM_JOB_ID")
    # The batch scripts of stages export SUBMITIT_EXECUTOR; a shell of salloc or sbatch has none.
    if job is None or "SLURM_JOB_NODELIST" not in os.environ or "SUBMITIT_EXECUTOR" in os.environ:
        return None
    cpus = [int(found) for found in CPUS.findall(os.environ.get("SLURM_JOB_CPUS_PER_NODE", "1"))]
    return Allocation(job, list(SlurmJobEnvironment().hostnames), min(cpus, default=1))


def is_for(plan: Plan) -> Allocation | None:
    """The allocation that a plan is to run in, None where this machine will do. UserError where it holds too little."""
    nodes = max(planned.spec.parallel.nodes for planned in plan.stages)
    held = allocation()
    if held is None or (nodes == 1 and socket.gethostname().partition(".")[0] in held.nodes):
        return None
    if nodes > len(held.nodes):
        raise UserError(
            f"the recipe asks for {nodes} nodes, and you hold {len(held.nodes)}: {held}",
            f"use --nodes {len(held.nodes)}, or hold more",
        )
    return held


class Held(Driven):
    """Runs whose stages are started on held nodes; those that this machine has room for are driven `otherwise`."""

    def __init__(self, otherwise: Driven) -> None:
        self._otherwise = otherwise

    def drive_stages(self, run: RunDir, display: Display, interrupts: StopSignals | None) -> int:
        """Run the unfinished stages, one after another, on the nodes that the run has claimed; the exit code."""
        if not paths.held(run).exists():
            return self._otherwise.drive_stages(run, display, interrupts)
        plan = runs.read_plan(run)
        if (held := is_for(plan)) is None:
            message = f"{run.path.name} runs on nodes that you hold, and here you hold none"
            raise UserError(message, "resume it in salloc")
        display.say(f"on nodes that you hold: {held}")
        write_json(paths.held_by(run), HeldBy(job=held.job, nodes=os.environ["SLURM_JOB_NODELIST"]))
        _await_end_of_steps(run, display)
        with nullcontext(interrupts) if interrupts else StopSignals() as heard:
            return _Driver(run, display, heard, held).run_unfinished(plan)

    def require_nodes(self, plan: Plan) -> None:
        """UserError where a plan asks for more nodes than are held."""
        if is_for(plan) is None:
            self._otherwise.require_nodes(plan)

    def require_rest(self, run: RunDir) -> None:
        """UserError where a driver on one of the nodes is at work in the run."""
        if (by := _lives(run)[0]) is not None:
            message = f"{run.path.name} is already running in job {by.job}"
            raise UserError(message, f"end it first: ftlaunch stop {run.in_shell}")

    def state(self, run: RunDir) -> RunStatus:
        """How a run stands, by what SLURM says of its driver's job where the driver itself cannot be seen from here."""
        found = super().state(run)
        if found.state != "unknown":
            return found
        by, ended = _lives(run)
        if by is None and not ended and lock.holder(run):
            return found
        stages = [
            _stage_status(run.stage_dir(stage.name), stage.attempts, by) if stage.state == "unknown" else stage
            for stage in found.stages
        ]
        now = run_status(run, stages)
        # Between two stages all of them wait, and yet the driver is at work.
        return msgspec.structs.replace(now, state="running") if by and now.state == "waiting" else now

    def is_over(self, run: RunDir) -> bool:
        """Whether nothing of a run works any more. False where its driver is elsewhere, and SLURM does not answer."""
        return super().is_over(run) or _lives(run)[1]

    def cancel(self, run: RunDir) -> None:
        """End every process of a run at once, also where its driver is on one of the nodes."""
        if _lives(run)[0] is None:
            super().cancel(run)
            return
        # The tasks read it and end their ranks; the driver then starts no other stage.
        for stage_dir in run.unfinished():
            write_atomic(stage_dir.stop, CANCEL)

    def choose_nodes(self, run: RunDir) -> None:
        """Note whether the run goes on by held nodes from here."""
        if is_for(runs.read_plan(run)) is None:
            paths.held(run).unlink(missing_ok=True)
            return
        write_json(paths.held(run), Cluster())
        write_json(paths.environment(run), dict[str, str]())  # the tasks have all of this process's


def _lives(run: RunDir) -> tuple[HeldBy | None, bool]:
    """The job that a driver on another machine works in, and whether that job is known to have ended instead."""
    who, by = lock.holder(run), read_json(paths.held_by(run), HeldBy)
    if who is None or processes.is_alive(who) is not None or by is None or shutil.which("scontrol") is None:
        return None, False
    try:
        entry = queue.show(by.job, Cluster())
    except UserError:
        return None, False
    lives = entry is not None and entry.alive and entry.nodes == by.nodes
    return (by, False) if lives else (None, True)


def _stage_status(stage_dir: StageDir, attempts: int, by: HeldBy | None) -> StageStatus:
    if by is not None:
        return msgspec.structs.replace(measured(stage_dir, attempts, "running", None), job=by.job, nodes=by.nodes)
    if stage_dir.stop_reason() == CANCEL:
        return measured(stage_dir, attempts, "cancelled", "as asked")
    decided = read_ended(stage_dir.all_attempts()[-1])
    return measured(stage_dir, attempts, "interrupted", decided.reason if decided else "its driver or job has ended")


def _await_end_of_steps(run: RunDir, display: Display) -> None:
    """Wait until nothing works any more of what a driver that was killed had started.

    UserError where it goes on, or where SLURM does not tell.
    """
    newest = [attempts[-1] for stage_dir in run.stage_dirs() if (attempts := stage_dir.all_attempts())]
    made_by = [read_made_by(one) for one in newest if not paths.ended(one).exists()]
    # Tasks on held nodes are "1234.5", step 5 of job 1234; a stage's own job has no dot.
    for job in [one.job for one in made_by if one is not None and "." in one.job]:
        deadline = time.monotonic() + GONE_SECONDS
        while job in queue.call(["squeue", "--noheader", "--format=%i", f"--steps={job}"], Cluster()).stdout.split():
            if time.monotonic() > deadline:
                raise UserError(f"tasks of {run.path.name} still work in step {job}", f"end them: scancel {job}")
            display.say(f"waits for tasks of a driver that was killed: step {job}")
            time.sleep(GONE_POLL_SECONDS)


@dataclass(frozen=True)
class _Driver(StageDriver):
    held: Allocation

    def run_stage(self, planned: PlannedStage) -> int:
        """See one stage from its start to its end, on other nodes where some are lost; the exit code says which end."""
        stage_dir = self.run.stage_dir(planned.name)
        write_files(self.run, planned)
        paths.jobs(stage_dir).mkdir(mode=0o700, exist_ok=True)
        count, lost, began = planned.spec.parallel.nodes, set[str](), time.time()
        while True:
            if self.interrupts.wish != "go on" or stage_dir.stop_reason() not in (None, REQUEUE):
                return self.stopped(stage_dir, "not started, as asked")
            nodes = [name for name in self.held.nodes if name not in lost][:count]
            if len(nodes) < count:
                self.display.say(f"{stage_dir.name}  {', '.join(sorted(lost))} lost, and {count} nodes are needed")
                return STAGE_FAILED
            before = len(stage_dir.all_attempts())
            log = paths.jobs(stage_dir) / f"held-{self.held.job}-{before + 1}.log"
            self._srun(planned, stage_dir, nodes, log)
            ended = _ended(stage_dir, before)
            # Only lost nodes need another srun: otherwise the tasks restart the ranks themselves, in place.
            if ended is None or ended.cause != "failed" or not ended.restarted or not ended.lost:
                return self._report_end(stage_dir, before, ended, log, duration(time.time() - began))
            lost |= {*ended.lost}

    def _srun(self, planned: PlannedStage, stage_dir: StageDir, nodes: list[str], log: Path) -> None:
        count = len(nodes)
        where = [f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", f"--nodelist={','.join(nodes)}"]
        # The user's own shell may be a step that holds the CPUs; without --overlap this one would wait for it.
        how = ["--overlap", f"--cpus-per-task={self.held.cpus}", "--kill-on-bad-exit=1", "--wait=60", "--export=ALL"]
        python = [sys.executable, "-u", "-P", "-m", "ftlaunch.backend.slurm.held_task", str(stage_dir.path)]
        metrics = MetricsTail(stage_dir.metrics, since=time.time())
        ranks = planned.spec.world_size
        self.display.say(f"{stage_dir.name}  {ranks} process{'es' if ranks > 1 else ''} on {', '.join(nodes)}")
        with log.open("wb") as file, self.display.stage(stage_dir.name):
            process = subprocess.Popen(
                ["srun", *where, *how, *python],
                cwd=self.run.path,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,  # a Ctrl-C in the terminal is the driver's to answer
                preexec_fn=_end_with_parent,
            )
            self._attend(process, stage_dir, metrics)

    def _attend(self, process: subprocess.Popen[bytes], stage_dir: StageDir, metrics: MetricsTail) -> None:
        killed: float | None = None
        while process.poll() is None:
            self.display.show(metrics.read())
            if self.interrupts.wish == "stop" and not stage_dir.stop.exists():
                write_atomic(stage_dir.stop, STOP)
                self.display.say(f"{stage_dir.name}  saving and stopping")
            if self.interrupts.wish == "kill" and killed is None:
                killed = time.monotonic()
                # Tasks read this and end their ranks. srun is killed only where that takes too long.
                write_atomic(stage_dir.stop, CANCEL)
            if killed is not None and time.monotonic() - killed > KILL_SECONDS:
                process.kill()
            time.sleep(POLL_SECONDS)
        self.display.show(metrics.read())

    def _report_end(self, stage_dir: StageDir, before: int, ended: AttemptRecord | None, log: Path, took: str) -> int:
        attempts = stage_dir.all_attempts()
        is_told = len(attempts) > before or stage_dir.result.exists()
        if is_told and (outcome := read_outcome(stage_dir, attempts[-1])):
            return self.report(stage_dir, outcome, took)
        if ended is not None:
            return self.stopped(stage_dir, f"{ended.cause} after {took}: {ended.reason}")
        said = last_lines(log, 8)
        self.display.say(f"{stage_dir.name}  its tasks left without a word after {took}\n{said}\n  log: {log}")
        return STAGE_FAILED


def _ended(stage_dir: StageDir, before: int) -> AttemptRecord | None:
    """How the newest attempt ended that was made after so many; None where none could say so."""
    attempts: list[Attempt] = stage_dir.all_attempts()[before:]
    return read_ended(attempts[-1]) if attempts else None


def _end_with_parent() -> None:
    """Have srun be told to end where this process is killed: its tasks then save and leave."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
