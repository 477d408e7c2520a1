"""SLURM's own word on the jobs of runs: one question to the controller, and one to the accounting if need be.

A job is a run's if its script lies in a stage's folder, or if it works in the run's folder and is named for a stage.
Either may be missing: a site's own sbatch submits a copy of the script, the accounting knows none, and
`scontrol update` may change the name. The id alone proves nothing: SLURM gives ids again, and so does another cluster.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from msgspec import Struct

from ftlaunch.backend.slurm import paths
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import UserError
from ftlaunch.run.files import read_if_sound, read_json
from ftlaunch.run.layout import RunDir, StageDir

TIMEOUT, ACCOUNTS_TIMEOUT, ASKED_AGAIN = 60.0, 20.0, 600.0
"""Seconds that a question to SLURM may take, that one to its accounting may, and until that is asked again."""
CACHED_SECONDS = 180.0
"""A site's own squeue may repeat an answer for a while: a job that it does not list may be younger than the answer."""
_UNANSWERED: dict[str | None, tuple[float, str | None]] = {}
"""When the accounting of a slurm.conf has kept this process waiting for nothing, and what to say of it."""
SEPARATOR = "\x1f"
"""Between the fields of a row: no run's folder holds a control character."""
FIELDS = SEPARATOR.join(("%i", "%T", "%r", "%N", "%S", "%j", "%Z", "%o"))
"""Id, state, reason, nodes, start, name, folder and batch script."""
SACCT_FIELDS = "JobIDRaw,State,Reason,NodeList,Start,JobName,WorkDir"
CONFIGURATIONS = (Path("/etc/slurm/slurm.conf"), Path("/etc/slurm-llnl/slurm.conf"), Path("/run/slurm/conf/slurm.conf"))
"""Where SLURM's commands look for their configuration."""
CLUSTER_NAME = re.compile(r"^\s*ClusterName\s*=\s*(\S+)", re.IGNORECASE | re.MULTILINE)
SHOWN = re.compile(
    r"^ *(?:JobId=(?P<id>\d+) JobName=(?P<name>.*)|JobState=(?P<state>\S+) Reason=(?P<reason>.*?) Dependency=.*"
    r"|StartTime=(?P<start>\S+) .*|NodeList=(?P<nodes>.*)|Command=(?P<script>.*)|WorkDir=(?P<folder>.*))$",
    re.MULTILINE,
)
"""Lines of `scontrol show job` that tell what squeue's fields do."""
AWAY = re.compile(
    r"unable to contact|socket timed out|connection (?:refused|timed out|failure)|zero bytes|has not answered"
    r"|not responding|no route to host|address already in use|backup controller in standby",
    re.IGNORECASE,
)
"""What SLURM's commands say where the controller does not answer, rather than refuses."""
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
}
"""States that no job leaves by itself. In any other, such as STOPPED, it holds nodes or may yet start."""
WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
"""States in which a job has no nodes."""
FILTERS = ("SQUEUE_", "SACCT_", "SCANCEL_", "SLURM_TIME_FORMAT")
"""Variables with which a user has SLURM's commands leave jobs out, ask back or print otherwise."""


class Job(Struct, frozen=True, kw_only=True):
    """A job that was submitted for a stage."""

    id: str
    submitted: float
    """Unix time in seconds."""
    after: str | None = None
    """Job that must have succeeded first."""
    successors: list[str] = []
    """Jobs that wait for its end to take over, each from the one before."""
    earlier: int = 0
    """Attempts of the stage by then. A job of the same id may have made them: SLURM may lose count and begin again."""

    @property
    def ids(self) -> list[str]:
        """It and those that may take over."""
        return [self.id, *self.successors]


class Entry(Struct, frozen=True, kw_only=True):
    """What SLURM says of a job."""

    id: str
    state: str
    """SLURM's word, such as PENDING."""
    reason: str | None = None
    """Why it waits or was ended."""
    nodes: str | None = None
    """Node list in SLURM's short form."""
    start: str | None = None
    """When it started or, while it waits, SLURM's guess of when it will."""
    name: str = ""
    """RUN/STAGE, where it is a run's."""
    folder: str = ""
    """Where it works."""
    script: str | None = None
    """Its batch script; None in the accounting, which does not know it."""

    @property
    def alive(self) -> bool:
        return self.state not in ENDED

    @property
    def stage(self) -> str | None:
        """The stage that it is for, by where its script lies or else by its name; None where neither tells of one."""
        if (folder := self._stage_folder) is not None:
            return folder.name
        return self.name.rpartition("/")[2] if "/" in self.name else None

    @property
    def run(self) -> str:
        """Where the run is that it is for, if it is for one."""
        return str(folder.parent) if (folder := self._stage_folder) is not None else self.folder

    @property
    def _stage_folder(self) -> Path | None:
        folder = Path(self.script or "").parent  # RUN/01-sft/jobs
        return folder.parent if folder.name == paths.JOBS else None


class Submission(Struct, frozen=True, kw_only=True):
    """submission.json: written before the jobs of a run are handed over, and again once all of them were taken."""

    cluster: str | None
    """Its name; None where nothing told it."""
    complete: bool
    """Whether every job was taken. Jobs of a submission that was cut short leave as soon as they start."""


@dataclass(frozen=True)
class Answer:
    """What SLURM says of one run's jobs."""

    entries: Mapping[str, Entry] = field(default_factory=dict[str, Entry])
    """What SLURM says of each job, by id: of those on record, and of others that the run must have submitted."""
    silent: str | None = None
    """Why nothing is known; None where SLURM has answered."""
    remedy: str = ""
    accounts: str | None = None
    """Why the accounting has told nothing of jobs that it was asked for; None where it has answered, or keeps none."""

    def of(self, stage_dir: StageDir) -> Entry | None:
        """That of a stage's job whose turn it is: the first that waits or runs, else the last that began."""
        job = read_job(stage_dir)
        own = [entry for entry in self.entries.values() if entry.stage == stage_dir.name]
        # A job may be another stage's by its script, and have taken this one over.
        recorded = [self.entries[id] for id in (job.ids if job else []) if id in self.entries]
        alive = [entry for entry in [*recorded, *own] if entry.alive]
        begun = [entry for entry in recorded if entry.start is not None]
        return next(iter([*alive, *reversed(begun), *recorded]), None)


def read_cluster(run: RunDir) -> Cluster:
    """The profile that a run was submitted with. UserError where it is of another version of ftlaunch."""
    file = paths.cluster(run)
    try:
        return msgspec.json.decode(file.read_bytes(), type=Cluster)
    except msgspec.DecodeError as error:
        raise UserError(f"{file} cannot be read: {error}", "go on with the ftlaunch that wrote it") from error


def read_job(stage_dir: StageDir) -> Job | None:
    """The newest job of a stage."""
    return read_json(paths.job(stage_dir), Job)


def environment(cluster: Cluster) -> dict[str, str]:
    """What SLURM's commands find the cluster by: what the caller's environment says, and over that the profile."""
    given = {name: os.environ[name] for name in ("SLURM_CONF", "SLURM_CLUSTERS") if name in os.environ}
    return given | ({"SLURM_CONF": cluster.slurm_conf} if cluster.slurm_conf else {})


def read_submission(run: RunDir) -> Submission | None:
    """What is on record of a run's newest submission; None where there was none, or it was taken back."""
    return read_json(paths.submission(run), Submission)


def cluster_name(cluster: Cluster) -> str | None:
    """The name of the cluster that SLURM's commands lead to from here; None where nothing tells it."""
    given = environment(cluster)
    if several := given.get("SLURM_CLUSTERS"):
        return several
    for file in [Path(given["SLURM_CONF"])] if "SLURM_CONF" in given else CONFIGURATIONS:
        if file.is_file() and (found := CLUSTER_NAME.search(file.read_text(errors="replace"))):
            return found[1]
    try:
        found = CLUSTER_NAME.search(call(["scontrol", "show", "config"], cluster).stdout)
    except UserError:
        return None
    return found[1] if found else None


def read_queue(run: RunDir) -> dict[str, Entry]:
    """What SLURM says of a run's jobs, by id; jobs that it has forgotten are left out.

    UserError where it does not answer, or where the run was submitted on another cluster than this.
    """
    answer = ask([run], surely=True)[0]
    if answer.silent is not None:
        raise UserError(answer.silent, answer.remedy)
    return dict(answer.entries)


def ask(runs: Sequence[RunDir], *, surely: bool = False) -> list[Answer]:
    """What SLURM says of the jobs of each of these runs, in their order: one question a cluster, however many runs.

    A job that squeue does not list is asked for by its id where it is young or, `surely`, in any case.
    """
    clusters: dict[str | None, list[RunDir]] = {}
    answers: dict[Path, Answer] = {}
    for run in runs:
        try:
            # None is the cluster that SLURM's commands find by themselves, "" a run that was never on one.
            clusters.setdefault(read_cluster(run).slurm_conf if paths.cluster(run).exists() else "", []).append(run)
        except UserError as error:
            answers[run.path] = Answer(silent=error.message, remedy=error.remedy)
    for conf, its in clusters.items():
        answers |= {run.path: Answer() for run in its} if conf == "" else _ask_cluster(its, surely)
    return [answers[run.path] for run in runs]


def _ask_cluster(runs: Sequence[RunDir], surely: bool) -> dict[Path, Answer]:
    cluster = read_cluster(runs[0])
    recorded = {run.path: on_record(run) for run in runs}
    if not any(paths.environment(run).exists() or recorded[run.path] for run in runs):
        return {run.path: Answer() for run in runs}  # none of them was ever submitted
    try:
        listed = {entry.id: entry for entry in _squeue(cluster, {uid for run in runs for uid in _users(run)})}
        now = time.time()
        for submitted, id in sorted((recorded[run.path][id], id) for run in runs for id in recorded[run.path]):
            if id not in listed and (surely or now - submitted < CACHED_SECONDS) and (shown := show(id, cluster)):
                listed[id] = shown
    except UserError as error:
        return {run.path: Answer(silent=f"SLURM does not answer: {error.message}", remedy=error.remedy) for run in runs}
    found = {run.path: {id: one for id, one in listed.items() if belongs(one, run)} for run in runs}
    missing = {id for run in runs for id in {*recorded[run.path]} - {*found[run.path]}}
    # squeue forgets a job MinJobAge seconds (300 by default) after its end; the accounting still has it.
    forgotten, unaccounted = _sacct(missing, cluster)
    answers: dict[Path, Answer] = {}
    for run in runs:
        # Ids are used again: under a recorded one the accounting may have somebody else's job.
        mine = {id: forgotten[id] for id in recorded[run.path] if id in forgotten and belongs(forgotten[id], run)}
        entries = mine | found[run.path]
        all_known = {*recorded[run.path]} <= {*entries}
        answer = Answer(entries=entries, accounts=unaccounted)
        answers[run.path] = answer if all_known else _unless_elsewhere(run, cluster, answer)
    return answers


def on_record(run: RunDir) -> dict[str, float]:
    """The run's jobs on record, with when each was submitted."""
    return {id: job.submitted for stage_dir in run.stage_dirs() if (job := read_job(stage_dir)) for id in job.ids}


def _unless_elsewhere(run: RunDir, cluster: Cluster, answer: Answer) -> Answer:
    """The answer, unless jobs are missing from it because they are another cluster's."""
    submission = read_submission(run)
    theirs = submission.cluster if submission else None
    here = cluster_name(cluster) if theirs else None
    if theirs is None or here is None or theirs == here:
        return answer
    remedy = f"call this on a login node of {theirs}; where {theirs} is no more, remove {paths.submission(run)}"
    return Answer(silent=f"it was submitted on cluster {theirs}, and this is {here}", remedy=remedy)


def dependency_on(run: RunDir) -> str | None:
    """What waits for the end of a run, as sbatch takes it; None where it is done. UserError where it has no job."""
    unfinished = run.unfinished()
    if not unfinished:
        return None
    job = read_job(unfinished[-1])
    entries = read_queue(run)
    if job is None or not any(id in entries and entries[id].alive for id in job.ids):
        raise UserError(f"{run.path.name} is not in the queue, so nothing can wait for it", "submit it first")
    # "?" means or: any of the stage's jobs may be the one that succeeds.
    return "?".join(f"afterok:{id}" for id in job.ids)


def dependency_on_job(id: str, cluster: Cluster) -> str | None:
    """What waits for a job of anybody's to succeed, as sbatch takes it; None where it has. UserError where it cannot.

    sbatch takes a number that SLURM does not know for a job that has succeeded. "12_3" is task 3 of the array 12, and
    12 all of its tasks.
    """
    if "ArrayJobId=" in (shown(id, cluster) or ""):
        return f"afterok:{id}"
    entry = show(id, cluster) or _sacct({id}, cluster)[0].get(id)
    if entry is None and shutil.which("scontrol") is not None:
        raise UserError(f"SLURM knows no job {id}, so nothing can wait for it", "see the numbers that squeue shows")
    if entry is None or entry.alive:
        return f"afterok:{id}"
    if entry.state != "COMPLETED":
        raise UserError(f"job {id} has ended without success: {entry.state}", "leave --after out, or name another job")
    return None


def belongs(entry: Entry, run: RunDir) -> bool:
    """Whether a job is one of a run's stages."""
    stage = entry.stage
    return stage is not None and entry.run == folder_of_jobs(run) and run.stage_dir(stage).path.is_dir()


def folder_of_jobs(run: RunDir) -> str:
    """Where a run's jobs work: its folder, called as it was when it was planned, also where it was moved since.

    A copy has no jobs: those are of the run that it was copied from.
    """
    if (plan := read_if_sound(run.plan, _Place)) is None:
        return str(run.path)
    planned = Path(plan.run_dir)
    is_copy = (planned / run.plan.name).exists() and not run.path.samefile(planned)
    return str(run.path if is_copy else planned)


class _Place(Struct, frozen=True):
    """The part of a plan that tells where it runs."""

    run_dir: str


def _users(run: RunDir) -> set[int]:
    """Whose jobs a run's may be: one may look at, or go on with, what another has submitted."""
    jobs = [paths.job(stage_dir) for stage_dir in run.stage_dirs()]
    return {os.geteuid(), *(file.stat().st_uid for file in (run.path, *jobs) if file.exists())}


def _squeue(cluster: Cluster, users: set[int]) -> list[Entry]:
    # By default squeue leaves out jobs that have ended, though the controller still knows them.
    whose = ",".join(map(str, sorted(users)))
    done = call(["squeue", "--noheader", "--states=all", f"--user={whose}", f"--format={FIELDS}"], cluster)
    if done.returncode:
        raise UserError(f"squeue failed: {done.stderr.strip()}", "try again when the controller answers")
    # A run whose row is cut off would look as if it had no job, and could be submitted twice.
    if done.stdout and not done.stdout.endswith("\n"):
        raise UserError("squeue's answer breaks off", "try again")
    return [entry for line in done.stdout.split("\n") if (entry := _entry(line.split(SEPARATOR)))]


def show(id: str, cluster: Cluster) -> Entry | None:
    """What the controller itself says of a job; None where it knows none of that id, or cannot be asked from here.

    UserError where it does not answer.
    """
    if (text := shown(id, cluster)) is None:
        return None
    said = [found.groupdict() for found in SHOWN.finditer(text)]
    told = {key: text for one in said for key, text in one.items() if text is not None}
    if told.get("id") != id or not {"state", "name", "folder"} <= {*told}:
        raise UserError(f"scontrol tells of something else than job {id}", f"see `scontrol show job {id}`")
    return msgspec.convert(told | {key: _said(told.get(key, "")) for key in ("reason", "nodes", "start")}, Entry)


def shown(id: str, cluster: Cluster) -> str | None:
    """What `scontrol show job` prints of a job, as `show` reads it."""
    if shutil.which("scontrol") is None:
        return None
    done = call(["scontrol", "show", "job", id], cluster)
    if done.returncode == 0:
        return done.stdout
    if "Invalid job id" in done.stderr:
        return None
    raise UserError(f"scontrol failed: {done.stderr.strip()}", "try again when the controller answers")


def still_alive(entry: Entry, cluster: Cluster) -> bool:
    """Whether a job that squeue has told of waits or works by now."""
    now = show(entry.id, cluster)
    return entry.alive if now is None or now.run != entry.run else now.alive


def _entry(fields: list[str]) -> Entry | None:
    """A row of SLURM's; None for a line that is none, as a site may print some of its own."""
    # squeue's rows have eight fields and sacct's seven. Ids such as 12_3 are of arrays, 12.batch of steps.
    if len(fields) not in (7, 8) or not fields[0].isdigit():
        return None
    job, state, reason, nodes, start, name, folder, *script = fields
    said = {"reason": _said(reason), "nodes": _said(nodes), "start": _said(start)}
    return Entry(id=job, state=state, name=name, folder=folder, script=script[0] if script else None, **said)


def _said(text: str) -> str | None:
    return None if text in ("", "None", "N/A", "NOT_SET", "INVALID", "Unknown", "(null)") else text


def _sacct(ids: set[str], cluster: Cluster) -> tuple[dict[str, Entry], str | None]:
    """What the accounts say of jobs that the controller has forgotten, and why they say nothing.

    A site that keeps no accounts has nothing to tell, which is no error.
    """
    if not ids:
        return {}, None
    if (asked := _UNANSWERED.get(cluster.slurm_conf)) and time.monotonic() - asked[0] < ASKED_AGAIN:
        return {}, asked[1]
    options = ["--noheader", "--allocations", "--parsable2", f"--format={SACCT_FIELDS}"]
    try:
        done = call(["sacct", *options, f"--jobs={','.join(sorted(ids))}"], cluster, ACCOUNTS_TIMEOUT)
    except UserError as error:
        # Asked at each look, it would hold up `logs -f` and others again and again.
        said = shutil.which("sacct") and error.message
        _UNANSWERED[cluster.slurm_conf] = time.monotonic(), said
        return {}, said
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2]
        return {}, None if "accounting storage is disabled" in said else f"sacct failed: {said}"
    found: dict[str, Entry] = {}
    for line in (line for line in done.stdout.splitlines() if line.count("|") >= 6):
        # The folder comes last, so that a | in its name stays part of it.
        job, state, reason, nodes, start, name, folder = line.split("|", 6)
        # A state may have an explanation: "CANCELLED by 1000".
        if entry := _entry([job, state.partition(" ")[0], reason, nodes, start, name, folder]):
            found[entry.id] = entry
    return {id: entry for id, entry in found.items() if id in ids}, None


def cancel(ids: Iterable[str], cluster: Cluster, *options: str) -> None:
    """End jobs, or signal them with options of scancel. UserError where SLURM does not let them be ended."""
    # scancel treats a call without an id as an error.
    if not (named := list(ids)):
        return
    done = call(["scancel", *options, *named], cluster)
    if done.returncode:
        raise UserError(f"scancel failed: {done.stderr.strip()}", f"try again, or `scancel {' '.join(named)}` yourself")


def call(command: list[str], cluster: Cluster, timeout: float = TIMEOUT) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands. UserError where it is not installed or does not answer in time.

    It has no terminal: neither can it ask back, nor does a Ctrl-C end it half-way. What it prints may be in any
    encoding; like names of files, it is told apart by its bytes.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith(FILTERS)}
    try:
        done = subprocess.run(
            command,
            env=variables | environment(cluster),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed here", "call this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} has not answered for {timeout:g} s", "try again later") from None
    out, err = os.fsdecode(done.stdout), done.stderr.decode(errors="replace")
    return subprocess.CompletedProcess(command, done.returncode, out, err)
