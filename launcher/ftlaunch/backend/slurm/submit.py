"""Stages as SLURM jobs: submitit hands each over with its batch script, to start when the one before has succeeded."""

import io
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import msgspec
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env

from ftlaunch.backend import runs
from ftlaunch.backend.folders import write_files
from ftlaunch.backend.slurm import carried, code_copy, messages, paths, queue
from ftlaunch.backend.slurm import entry as job_entry
from ftlaunch.backend.slurm.queue import Job, Submission
from ftlaunch.backend.slurm.record import is_cut_short, signs_of_life
from ftlaunch.backend.slurm.request import Batch, executor, fits_into, require_time_to_save
from ftlaunch.cluster import NEW
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import Interrupted, UserError
from ftlaunch.plan.plan import Plan, PlannedStage
from ftlaunch.processes import lock
from ftlaunch.processes.signals import StopSignals
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import RunDir, StageDir

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
GONE_SECONDS, GONE_POLL_SECONDS = 40.0, 0.5
"""Jobs that were taken back may take so long to be gone."""
OR_RESUME = "; then: ftlaunch resume"
FULL = "try again when other jobs have left the queue"
LIMIT = re.compile(r"MaxSubmitJob|unable to accept job|temporarily unavailable|queue full")
"""sbatch's words where the queue holds as many jobs as it may, of the user or (MaxJobCount) of everybody."""
ANY_LIMIT = "job submit limit"
"""Among sbatch's words for each limit that there is: they stand for this one where no other line names another."""
UNSURE = re.compile(r"timed out on|zero bytes", re.IGNORECASE)
"""sbatch's words where the controller was asked and did not answer in time: it may have taken the job all the same."""
ERROR, REASON = (re.compile(rf"^sbatch: {kind}(.+)$", re.MULTILINE) for kind in ("error: ", ""))
"""What sbatch says; a site's job_submit script may have it greet before it says what is wrong."""


class Unanswered(UserError):
    """SLURM may have a job of which nobody knows the id."""


class Full(UserError):
    """The queue takes no other job by now."""


def require_sbatch() -> None:
    """UserError where jobs cannot be submitted from here at all."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not installed here", "call this on a login node of the cluster")


def require_fit(plan: Plan, cluster: Cluster) -> None:
    """UserError where a plan's jobs cannot be submitted from here, or not for a run in its folder."""
    require_sbatch()
    for planned in plan.stages:
        executor(plan, planned, cluster)


def submit(run: RunDir, plan: Plan, after: str | None = None) -> list[Job]:
    """Submit the unfinished stages, each to start when the one before has succeeded, and return their jobs in order.

    `after` is what the first of them also waits for, as sbatch takes a dependency.

    A run that was submitted before takes its code again. UserError where the run still has jobs, where its steps take
    too long to save in time, or where sbatch refuses one. Whatever ends a submission, none of its jobs stays in the
    queue: they are taken back or, where this process is killed, leave by themselves as soon as they start.
    """
    with lock.hold(run):
        require_sbatch()
        cluster = queue.read_cluster(run)
        with StopSignals() as interrupts:
            # First, as refuse_twice would take the jobs of a submission that was cut short for a run in the queue.
            clear_cut_short(run, cluster)
            refuse_twice(run)
            plan = _at_home(run, plan)
            require_time_to_save(run, plan, cluster)
            if not run.code_index.exists() or any(paths.job(stage_dir).exists() for stage_dir in run.stage_dirs()):
                code_copy.retake(run, plan.recipe)
            return _all_or_nothing(run, plan, cluster, interrupts, after)


def _at_home(run: RunDir, plan: Plan) -> Plan:
    """A run's plan, which goes with its folder where that was moved or copied."""
    planned = Path(plan.run_dir)
    if planned.exists() and planned.samefile(run.path):
        return plan
    print(f"{run.path.name} was planned in {planned}: from now on it is {run.path}", file=sys.stderr)
    moved = msgspec.structs.replace(plan, run_dir=str(run.path))
    write_json(run.plan, moved)
    return moved


def _all_or_nothing(run: RunDir, plan: Plan, cluster: Cluster, interrupts: StopSignals, after: str | None) -> list[Job]:
    record = Submission(cluster=queue.cluster_name(cluster), complete=False)
    unfinished = runs.unfinished(run, plan)
    try:
        # Before the first sbatch: a job that starts while `complete` is false waits, and leaves if we die here.
        write_json(paths.submission(run), record)
        carried.keep(run)
        for planned in unfinished:
            paths.job(run.stage_dir(planned.name)).unlink(missing_ok=True)
        with signs_of_life(run):
            jobs = _submit_all(run, plan, unfinished, cluster, interrupts, after)
        _heed(interrupts, run)
        _require_known(run, jobs)
        write_json(paths.submission(run), msgspec.structs.replace(record, complete=True))
    # Also a signal or Ctrl-C between two jobs: whatever ends the submission, no job of it may stay in the queue.
    except BaseException as error:
        left = _take_back(run, cluster, for_good=not isinstance(error, Unanswered))
        if isinstance(error, OSError):
            error = UserError(f"{run.path} cannot be written: {error.strerror or error}", "make room, or mend the disk")
        if left is not None and isinstance(error, UserError):
            error.message += f"; and its jobs could not be taken back: {left}"
        raise error
    return jobs


def _submit_all(
    run: RunDir,
    plan: Plan,
    unfinished: list[PlannedStage],
    cluster: Cluster,
    interrupts: StopSignals,
    after: str | None,
) -> list[Job]:
    jobs: list[Job] = []
    with submitting_to(cluster):
        for planned in unfinished:
            stage_dir = run.stage_dir(planned.name)
            stage_dir.stop.unlink(missing_ok=True)
            messages.clear(stage_dir)
            write_files(run, planned)
            batch = executor(plan, planned, cluster)
            batch.after = after_success(jobs[-1]) if jobs else after
            try:
                jobs.append(_submit_stage(stage_dir, batch, jobs, cluster, interrupts))
            except Full as error:
                # Its own job may have been taken, and one that was to take over from it refused.
                taken = queue.read_job(stage_dir)
                queue.cancel(taken.ids if taken else [], cluster)
                paths.job(stage_dir).unlink(missing_ok=True)
                # The first job submits the rest later on; without one nobody would.
                if not jobs:
                    raise
                print(
                    f"{stage_dir.name} is submitted once {unfinished[0].name} has ended: {error.message}",
                    file=sys.stderr,
                )
                break
    return jobs


def after_success(job: Job) -> str:
    """What waits for a stage to be done, whichever of its jobs does it, as sbatch takes it."""
    return "?".join(f"afterok:{id}" for id in job.ids)


def submit_rest(run: RunDir, stage_dir: StageDir) -> None:
    """From a stage's own job, submit stages for which there was no room in the queue; nothing where there are none.

    UserError where SLURM does not take the next one either.
    """
    plan, cluster = runs.read_plan(run), queue.read_cluster(run)
    rest, job = _left_over(run, plan, stage_dir), queue.read_job(stage_dir)
    if not rest or job is None:
        return
    with lock.hold(run):
        _submit_all(run, plan, rest, cluster, StopSignals(), after_success(job))


def take_over(run: RunDir, stage_dir: StageDir, job: str) -> str | None:
    """Return the stage that a job goes on with at the end of its own; None if that has, or gets, a job of its own.

    The job does so where the queue takes only one job of the run, and the next stage needs no more than this one has.
    """
    plan, cluster = runs.read_plan(run), queue.read_cluster(run)
    if not (rest := _left_over(run, plan, stage_dir)):
        return None
    following = rest[0]
    try:
        submit_rest(run, stage_dir)
    except UserError as error:
        now = next(planned for planned in plan.stages if planned.name == stage_dir.name)
        if not (isinstance(error, Full) and fits_into(following, now, cluster)):
            print(f"{following.name} is not submitted: {error}", file=sys.stderr)
            return None
        print(f"{following.name} goes on in job {job}, as the queue takes no other", file=sys.stderr)
        taken = run.stage_dir(following.name)
        write_json(paths.job(taken), Job(id=job, submitted=time.time(), earlier=len(taken.all_attempts())))
        return following.name
    return None


def _left_over(run: RunDir, plan: Plan, stage_dir: StageDir) -> list[PlannedStage]:
    """Later stages that have neither a result nor a job; none where the next one has either."""
    later = [planned for planned in plan.stages if planned.name > stage_dir.name]
    rest = [planned for planned in later if not paths.job(run.stage_dir(planned.name)).exists()]
    rest = [planned for planned in rest if not run.stage_dir(planned.name).result.exists()]
    return rest if rest[:1] == later[:1] else []


def _require_known(run: RunDir, jobs: list[Job]) -> None:
    """UserError where SLURM answers, and does not have every job under the id that sbatch told."""
    answer = queue.ask([run])[0]
    strange = [id for job in jobs for id in job.ids if answer.silent is None and id not in answer.entries]
    if strange:
        raise UserError(
            f"SLURM does not know job {', '.join(strange)} as the run's, though sbatch has told so",
            "see whether `sbatch --parsable` prints the job's number last, and whether the site changes both name and"
            " script of jobs, by which they are known",
        )


def require_rest(run: RunDir) -> None:
    """UserError where a run cannot be submitted again, as jobs of it wait or work or are being submitted."""
    with lock.hold(run):
        clear_cut_short(run, queue.read_cluster(run))
        refuse_twice(run)


def refuse_twice(run: RunDir) -> None:
    """UserError where jobs of the run wait or work."""
    cluster = queue.read_cluster(run)
    alive = [entry for entry in queue.read_queue(run).values() if entry.alive and queue.still_alive(entry, cluster)]
    if any(entry.state == "COMPLETING" for entry in alive):
        message = f"{run.path.name} has ended or goes back into the queue, and SLURM still cleans up after it"
        raise UserError(message, f"try again in a moment; see how it stands: ftlaunch status {run.in_shell}")
    if alive:
        ids = ", ".join(entry.id for entry in alive)
        raise UserError(
            f"{run.path.name} is in the queue already (job {ids})",
            f"watch it with `ftlaunch status {run.in_shell}`, end it with `ftlaunch cancel {run.in_shell}`",
        )


def clear_cut_short(run: RunDir, cluster: Cluster) -> None:
    """Take back the jobs of a submission whose process was killed, and wait until they are gone.

    The caller holds the run's lock, so nobody is submitting any more.
    """
    if not is_cut_short(run):
        return
    deadline = time.monotonic() + GONE_SECONDS
    looks = 0
    while looks < 2 and time.monotonic() < deadline:  # an sbatch that outlives its caller may hand over another
        alive = [entry.id for entry in queue.read_queue(run).values() if entry.alive]
        queue.cancel(alive, cluster)
        looks = 0 if alive else looks + 1
        time.sleep(GONE_POLL_SECONDS)
    paths.submission(run).unlink()


def _take_back(run: RunDir, cluster: Cluster, *, for_good: bool) -> str | None:
    """Take every job of a submission out of the queue, and its record away. Says why where that cannot be done.

    They are those that SLURM knows as the run's: of the last one no id, or a wrong one, may have come back. Where one
    may still come, not `for_good`, the submission stays on record as cut short: the next one takes that back first.
    """
    try:
        known = queue.read_queue(run)
        renamed = [id for id in queue.on_record(run) if id not in known and _writes_into(id, run, cluster)]
        queue.cancel([*(entry.id for entry in known.values() if entry.alive), *renamed], cluster)
    except UserError as error:
        return f"{error.message}; they leave as soon as they start"
    for stage_dir in run.unfinished():
        paths.job(stage_dir).unlink(missing_ok=True)
    if for_good:
        paths.submission(run).unlink(missing_ok=True)
    return None


def _writes_into(id: str, run: RunDir, cluster: Cluster) -> bool:
    """Whether a job's output goes where a run's jobs write: a mark that a renamed copy of a script has as well."""
    told = queue.shown(id, cluster) or ""
    return any(f"StdOut={paths.job_output(stage_dir, id)}\n" in told for stage_dir in run.stage_dirs())


def _submit_stage(
    stage_dir: StageDir, batch: Batch, before: Sequence[Job], cluster: Cluster, interrupts: StopSignals
) -> Job:
    """Submit a stage's job, and those that wait to take over from it. UserError where sbatch refuses one."""
    after = before[-1].id if before else None
    earlier = len(stage_dir.all_attempts())
    job = Job(id=_hand_over(stage_dir, batch, interrupts), submitted=time.time(), after=after, earlier=earlier)
    write_json(paths.job(stage_dir), job)
    for _ in range(cluster.successors if cluster.restart == "successor" else 0):
        # "," means and: a successor starts only after every job before it has failed.
        batch.after = ",".join(f"afternotok:{id}" for id in job.ids)
        try:
            another = _hand_over(stage_dir, batch, interrupts)
        except Full as error:
            raise Full(f"{error.message} (of its successors)", f"fewer `successors`, or {FULL}") from error
        job = msgspec.structs.replace(job, successors=[*job.successors, another])
        write_json(paths.job(stage_dir), job)
    return job


def _hand_over(stage_dir: StageDir, batch: Batch, interrupts: StopSignals) -> str:
    """The id of the job that sbatch has made of a batch.

    UserError, in sbatch's words, where it makes none; Interrupted where a signal asks for an end.
    """
    run = stage_dir.run
    _heed(interrupts, run)
    talk = io.StringIO()
    try:
        with _held_back(), redirect_stderr(talk):  # submitit prints what sbatch says, which is told below
            return batch.submit(job_entry.run_stage, str(stage_dir.path)).job_id
    except (FailedJobError, FailedSubmissionError) as error:
        # All of them: which line is the reason, and which a greeting, only a person can tell.
        lines = ERROR.findall(str(error)) or REASON.findall(str(error)) or [str(error)]
        said = "; ".join(lines)
        message = f"{stage_dir.name} cannot be submitted: {said}"
        if LIMIT.search(said) or (len(lines) == 1 and ANY_LIMIT in said):
            raise Full(message, FULL) from error
        if UNSURE.search(str(error)):
            message += "; a job that was taken all the same is not heeded"
            raise Unanswered(message, f"when the controller answers: ftlaunch resume {run.in_shell}") from error
        if queue.AWAY.search(str(error)):
            raise UserError(message, "try again when the controller answers") from error
        mend = f"mend the recipe or the profile, or write {NEW} where there is none"
        remedy = f"{mend}{OR_RESUME} {run.in_shell} --cluster NAME, which reads it again"
        raise UserError(message, remedy) from error
    except OSError as error:
        raise UserError(
            f"{stage_dir.name} cannot be submitted: {error.strerror or error}", "make room, or mend the disk"
        ) from error


def _heed(interrupts: StopSignals, run: RunDir) -> None:
    """Interrupted where a signal has asked for an end."""
    if interrupts.wish != "go on":
        message = f"{run.path.name} is not submitted: what had been was taken back"
        remedy = f"when you want it{OR_RESUME} {run.in_shell}"
        raise Interrupted(message, remedy, interrupts.exit_code)


@contextmanager
def _held_back() -> Generator[None]:
    """Signals wait while sbatch is asked: whether it has made a job must be known."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def submitting_to(cluster: Cluster) -> Generator[None]:
    """Lead SLURM's commands to a cluster, so that they are no step of the job that this may itself run in.

    What is written meanwhile can be read by its owner only: submitit's calls are pickles, which run code.
    """
    led = queue.environment(cluster)
    before = os.umask(0o077)
    try:
        with clean_env():
            # clean_env has dropped every variable with SLURM_ in front, SLURM_CONF included, and puts them back.
            os.environ.update(led)
            try:
                yield
            finally:
                for name in led:
                    del os.environ[name]
    finally:
        os.umask(before)
