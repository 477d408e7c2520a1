"""How stages stand that are SLURM jobs: told by the run's folder, and by SLURM where it answers."""

import re
from collections.abc import Sequence

import msgspec

from ftlaunch import processes
from ftlaunch.backend import runs
from ftlaunch.backend.slurm import causes, paths, queue, reasons, record, restart_policy
from ftlaunch.backend.slurm.messages import read_made_by
from ftlaunch.backend.slurm.queue import Answer, Entry
from ftlaunch.backend.status import RunStatus, StageStatus, State, measured, run_status
from ftlaunch.processes import lock
from ftlaunch.processes.outcome import Failure, Stopped, read_outcome
from ftlaunch.run.files import last_lines, why_unwritable
from ftlaunch.run.layout import CANCEL, REQUEUE, Attempt, RunDir, StageDir

ALIVE: dict[str, State] = {
    **dict.fromkeys(("RUNNING", "COMPLETING", "SIGNALING", "RESIZING", "STAGE_OUT"), "running"),
    **dict.fromkeys(("SUSPENDED", "STOPPED"), "suspended"),
}
HELD_LATER = "somebody holds it: where it has to go back into the queue it stays there until `scontrol release`"
SETUP = "look at the profile's setup, python, container"
NODES = {"NODE_FAIL", "BOOT_FAIL"}
BROKEN = {"FAILED", "OUT_OF_MEMORY", "BOOT_FAIL"}
NOISE = re.compile(r"^(srun|slurmstepd|submitit)\b|^\s*$|^\d+ submitit|^    |^Traceback")
"""Lines of a job's output that say that something failed, and not what."""


def states(every: Sequence[RunDir]) -> list[RunStatus]:
    """How runs stand, in their order; SLURM is asked once for all of those that are not finished."""
    asked = [run for run in every if not runs.finished(run)]
    answers = {run.path: answer for run, answer in zip(asked, queue.ask(asked), strict=True)}
    return [_state_of_run(run, answers.get(run.path, Answer())) for run in every]


def is_over(run: RunDir) -> bool:
    """Whether none of a run's jobs waits or works; False where SLURM does not answer."""
    answer = queue.ask([run])[0]
    return answer.silent is None and not any(entry.alive for entry in answer.entries.values())


def _state_of_run(run: RunDir, answer: Answer) -> RunStatus:
    first = runs.first_unfinished(run)
    return run_status(run, [_state_of_stage(stage_dir, answer, first) for stage_dir in run.stage_dirs()])


def _state_of_stage(stage_dir: StageDir, answer: Answer, first: StageDir | None) -> StageStatus:
    job, entry = queue.read_job(stage_dir), answer.of(stage_dir)
    stage = measured(stage_dir, len(stage_dir.all_attempts()), *stage_state(stage_dir, answer, first))
    waits = entry is not None and entry.state == "PENDING"
    before = _before_this(stage_dir, entry) if stage.state in ("queued", "running", "suspended") else None
    return msgspec.structs.replace(
        stage,
        note="; ".join(filter(None, (stage.note, before))) or None,
        job=entry.id if entry else job.id if job else None,
        nodes=entry.nodes if entry else None,
        start=entry.start if entry and waits else None,
    )


def stage_state(stage_dir: StageDir, answer: Answer, first_unfinished: StageDir | None) -> tuple[State, str | None]:
    """Return the state of a stage, and a remark on it."""
    if stage_dir.result.exists():
        return "done", None
    is_first = first_unfinished is not None and stage_dir.name == first_unfinished.name
    if answer.silent is not None:
        return _unseen(stage_dir, answer.silent) if is_first else ("waiting", None)
    entry = answer.of(stage_dir)
    told = _as_its_attempt_says(stage_dir, entry)
    # What a site does when a job has ended may take it minutes. SLURM itself may put a job back that is COMPLETING, but
    # not one whose tasks have left because another start would be in vain.
    if entry and entry.state == "COMPLETING" and told and _given_up(stage_dir.all_attempts()[-1]):
        return told
    if entry and entry.alive:
        state, note = _alive(entry)
        return state, _cut_short(stage_dir) or note
    # Only now: a live job that was asked to stop is still saving.
    if (asked := stage_dir.stop_reason()) not in (None, REQUEUE):
        return _as_asked(stage_dir, asked)
    # The folder comes before SLURM, which knows an exit code where the attempt knows the error.
    if told:
        return told
    if is_first and (id := _bringer(stage_dir, answer)) is not None:
        return "waiting", f"job {id} submits it, or goes on with it"
    if is_first or entry:
        state, note = _ended(stage_dir, entry, None if is_first else first_unfinished)
        return state, f"{note}; {answer.accounts}" if answer.accounts and entry is None else note
    return "waiting", None


def _alive(entry: Entry) -> tuple[State, str | None]:
    if entry.state == "SUSPENDED":
        return "suspended", "SLURM has suspended its job, and lets it go on later"
    if entry.state == "STOPPED":
        return "suspended", f"its job was stopped by a signal: scancel --signal=CONT {entry.id}"
    if entry.state in ALIVE:
        return ALIVE[entry.state], HELD_LATER if entry.reason in ("JobHeldAdmin", "JobHeldUser") else None
    if entry.reason == "Dependency":
        return "waiting", None
    if entry.state in queue.WAITING:
        return "queued", reasons.why_waiting(entry.reason if entry.state == "PENDING" else entry.state)
    return "queued", f"SLURM prepares its nodes: {entry.state}"


def _before_this(stage_dir: StageDir, entry: Entry | None) -> str | None:
    """How the last attempt ended that a stage goes on after; None where none has."""
    attempts = stage_dir.all_attempts()
    waits = entry is not None and entry.state in queue.WAITING
    for attempt in reversed(attempts):
        decided = restart_policy.read_ended(attempt)
        if decided is not None:
            goes_on = decided.restarted or waits or attempt is not attempts[-1]
            return f"attempt {attempt.number} {decided.cause}: {decided.reason}" if goes_on else None
        if (failure := _cut_off(attempt, entry)) is not None:
            return f"attempt {attempt.number} lost: {failure.first_line}"
    return None


def _cut_off(attempt: Attempt, entry: Entry | None) -> Failure | None:
    """What ended an attempt whose job has no nodes any more and has not concluded it."""
    is_gone = entry is None or not entry.alive or entry.state in queue.WAITING
    return causes.of_cut_off(attempt) if is_gone else None


def _cut_short(stage_dir: StageDir) -> str | None:
    """What is to be said of a job whose submission was killed before it was whole: nobody will have it train."""
    who = lock.holder(stage_dir.run)
    if not record.is_cut_short(stage_dir.run) or (who and processes.is_alive(who) is not False):
        return None
    return "its submission was cut short, and it leaves as soon as it starts: ftlaunch resume submits the run again"


def _bringer(stage_dir: StageDir, answer: Answer) -> str | None:
    """The run's job that sees to a stage for which the queue had no room; None where none lives."""
    submission = queue.read_submission(stage_dir.run)
    if submission is None or not submission.complete or queue.read_job(stage_dir) is not None:
        return None
    return next((entry.id for entry in answer.entries.values() if entry.alive), None)


def _as_asked(stage_dir: StageDir, asked: str | None) -> tuple[State, str | None]:
    if asked == CANCEL:
        return "cancelled", "as asked"
    outcome = _outcome(stage_dir)
    if isinstance(outcome, Failure):
        return "failed", outcome.first_line
    return "stopped", None if outcome else "before it started, as asked"


def _as_its_attempt_says(stage_dir: StageDir, entry: Entry | None) -> tuple[State, str | None] | None:
    """What the newest attempt says; None where there is none, or where a later job died before it could make one."""
    if died_early(stage_dir, entry) is not None:
        return None
    match _outcome(stage_dir):
        case Failure(type=causes.LOST) as failure if entry:
            return "failed", f"{failure.first_line}; {_ended_by(entry)}"
        case Stopped():
            # Tasks that have saved leave with a code of their own, which says no more than that.
            if entry and entry.state not in ("COMPLETING", "COMPLETED") and entry.reason != "NonZeroExitCode":
                return "stopped", _ended_by(entry)
            return "stopped", _given_up(stage_dir.all_attempts()[-1])
        case Failure() as failure:
            return "failed", failure.first_line
        case _:
            return None


def _outcome(stage_dir: StageDir) -> Failure | Stopped | None:
    attempts = stage_dir.all_attempts()
    match read_outcome(stage_dir, attempts[-1]) if attempts else None:
        case Failure() as failure:
            return causes.of_cut_off(attempts[-1]) or failure
        case outcome:
            return outcome if isinstance(outcome, Stopped) else None


def _ended(stage_dir: StageDir, entry: Entry | None, earlier: StageDir | None) -> tuple[State, str | None]:
    """State and note of a stage whose job is gone, or never was, and that has left no word itself."""
    if earlier is not None and entry:
        return "cancelled", f"with {earlier.name}"
    early = died_early(stage_dir, entry)
    if entry is not None:
        word = _ended_by(entry)
        cancelled = entry.state.startswith("CANCELLED")
        state: State = "failed" if entry.state in BROKEN else "cancelled" if cancelled else "interrupted"
        if early and early.traceback and not cancelled:
            return state, f"{word}: {early.message}"
        attempts = stage_dir.all_attempts()
        lost = causes.of_cut_off(attempts[-1]) if attempts and entry.state in {*BROKEN, "NODE_FAIL"} else None
        if lost:
            return state, f"{word}; {lost.first_line}"
        why = why_unwritable(stage_dir.path) if state == "failed" else None
        return state, f"{word}: {stage_dir.path} cannot be written: {why}" if why else word
    run = stage_dir.run
    if (driver := lock.holder(run)) and processes.is_alive(driver) is not False:
        return "waiting", "is being submitted"
    if (job := queue.read_job(stage_dir)) is None:
        return "interrupted", "its submission was cut short" if record.is_cut_short(run) else "not submitted"
    return "interrupted", early.message if early else f"SLURM does not know job {job.id} any more"


def _ended_by(entry: Entry) -> str:
    return f"SLURM ended its job {entry.id}: {reasons.why_ended(entry.state, entry.reason)}"


def _unseen(stage_dir: StageDir, silent: str) -> tuple[State, str | None]:
    """State and note of the stage whose turn it is, where SLURM does not answer."""
    attempts = stage_dir.all_attempts()
    decided = restart_policy.read_ended(attempts[-1]) if attempts else None
    # An attempt that was concluded, and after which the stage is not started again.
    if decided and not decided.restarted and (outcome := _outcome(stage_dir)):
        return ("failed", outcome.first_line) if isinstance(outcome, Failure) else ("stopped", silent)
    return "unknown", silent


def _given_up(attempt: Attempt) -> str | None:
    """Why no other attempt follows one that was concluded; None where that was not decided here."""
    decided = restart_policy.read_ended(attempt)
    return decided.reason.partition(f"{restart_policy.GIVEN_UP}: ")[2] or None if decided else None


def last_words(stage_dir: StageDir, entry: Entry | None) -> Failure | None:
    """What a stage's newest job died of, where that left it no time to write it down."""
    attempts = stage_dir.all_attempts()
    return died_early(stage_dir, entry) or (_cut_off(attempts[-1], entry) if attempts else None)


def died_early(stage_dir: StageDir, entry: Entry | None) -> Failure | None:
    """What a stage's newest job said before its death, where that came before it could make an attempt."""
    job = queue.read_job(stage_dir)
    if job is None or (entry is not None and entry.alive):
        return None
    makers = {made_by.job for one in stage_dir.all_attempts()[job.earlier :] if (made_by := read_made_by(one))}
    outputs = [(id, paths.job_output(stage_dir, id)) for id in job.ids if paths.job_output(stage_dir, id).exists()]
    known = entry is not None and (entry.state in BROKEN | NODES or entry.reason == "JobLaunchFailure")
    # A job that made an attempt has left its errors there.
    if makers & {*job.ids} or not (outputs or known):
        return None
    id, output = outputs[-1] if outputs else (job.id, paths.job_output(stage_dir, job.id))
    said = last_lines(output)
    telling = [line for line in said.splitlines() if not NOISE.search(line)] or said.splitlines()
    slurm = reasons.why_ended(entry.state, entry.reason) if entry else "SLURM does not know it any more"
    message = telling[-1].strip() if telling else f"job {id} left no word: {slurm}"
    if not telling and (why := why_unwritable(stage_dir.path)):
        message = f"{stage_dir.path} cannot be written: {why}"
    look = "`sinfo -R` tells why, and `ftlaunch resume` goes on" if entry and entry.state in NODES else SETUP
    remedy = f"job {id} died before the stage could start ({slurm}): {look}"
    return Failure(rank=None, type="JobDied", message=message, remedy=remedy, traceback=said, log=str(output))
