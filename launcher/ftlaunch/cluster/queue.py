"""SLURM's own word on the jobs of runs: one question to the controller, and one to the accounting if need be."""

import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from msgspec import Struct

from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import UserError
from ftlaunch.run.layout import RunDir, StepDir

TIMEOUT = 20.0
"""Seconds that a question to SLURM may take."""
FIELDS = "%i|%T|%r|%N|%S|%L"
ALIVE = {
    "PENDING",
    "RUNNING",
    "CONFIGURING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
}


class Job(Struct, frozen=True, kw_only=True):
    """A job that was submitted for a stage."""

    id: str
    submitted: float
    """Unix time in seconds."""
    after: str | None = None
    """Job that must have succeeded first."""
    successors: list[str] = []
    """Jobs that wait for its end to take over, each from the one before."""

    @property
    def ids(self) -> list[str]:
        """It and those that may take over."""
        return [self.id, *self.successors]

    def entry(self, entries: Mapping[str, "Entry"]) -> "Entry | None":
        """What SLURM says of the one whose turn it is: the first that waits or runs, else the last that began."""
        known = [entries[id] for id in self.ids if id in entries]
        alive = [entry for entry in known if entry.alive]
        begun = [entry for entry in known if entry.start is not None]
        return next(iter([*alive, *reversed(begun), *known]), None)


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
    left: str | None = None
    """Until its time limit, while it runs."""

    @property
    def alive(self) -> bool:
        return self.state in ALIVE


def read_cluster(run: RunDir) -> Cluster:
    """The profile that a run was submitted with. UserError where it is of another version of ftlaunch."""
    try:
        return msgspec.json.decode(run.cluster.read_bytes(), type=Cluster)
    except msgspec.DecodeError as error:
        raise UserError(f"{run.cluster} cannot be read: {error}", "go on with the ftlaunch that wrote it") from error


def read_job(step: StepDir) -> Job | None:
    """The newest job of a stage."""
    return msgspec.json.decode(step.job.read_bytes(), type=Job) if step.job.exists() else None


def environment(cluster: Cluster) -> dict[str, str]:
    """What SLURM's commands find the cluster by, on top of the caller's environment."""
    return {"SLURM_CONF": cluster.slurm_conf} if cluster.slurm_conf else {}


def read_queue(runs: Sequence[RunDir]) -> dict[str, Entry]:
    """What SLURM says of every job of these runs, by id; jobs that it has forgotten are left out.

    One question a cluster, whatever the number of runs. UserError where the controller does not answer.
    """
    found: dict[str, Entry] = {}
    wanted: dict[str | None, tuple[Cluster, set[str]]] = {}
    for run in runs:
        if run.cluster.exists():
            cluster = read_cluster(run)
            jobs = {id for step in run.step_dirs() if (job := read_job(step)) for id in job.ids}
            wanted.setdefault(cluster.slurm_conf, (cluster, set()))[1].update(jobs)
    for cluster, ids in wanted.values():
        if ids:
            known = _squeue(ids, cluster)
            found |= known | _sacct(ids - {*known}, cluster)
    return found


def _squeue(ids: set[str], cluster: Cluster) -> dict[str, Entry]:
    done = call(["squeue", "--noheader", "--states=all", f"--user={os.geteuid()}", f"--format={FIELDS}"], cluster)
    if done.returncode:
        raise UserError(f"squeue failed: {done.stderr.strip()}", "try again when the controller answers")
    entries = (_entry(line.split("|")) for line in done.stdout.splitlines())
    return {entry.id: entry for entry in entries if entry.id in ids}


def _entry(fields: list[str]) -> Entry:
    job, state, reason, nodes, start, left = fields
    return Entry(id=job, state=state, reason=_said(reason), nodes=_said(nodes), start=_said(start), left=_said(left))


def _said(text: str) -> str | None:
    return None if text in ("", "None", "N/A", "NOT_SET", "INVALID", "Unknown") else text


def _sacct(ids: set[str], cluster: Cluster) -> dict[str, Entry]:
    """Of jobs that the controller has forgotten; empty where the site keeps no accounts, which is no error."""
    if not ids:
        return {}
    options = ["--noheader", "--allocations", "--parsable2", "--format=JobIDRaw,State,Reason,NodeList,Start"]
    done = call(["sacct", *options, f"--jobs={','.join(sorted(ids))}"], cluster)
    if done.returncode:
        return {}
    rows = (line.split("|") for line in done.stdout.splitlines())
    # A state may have an explanation: "CANCELLED by 1000".
    entries = (_entry([job, state.partition(" ")[0], *others, ""]) for job, state, *others in rows)
    return {entry.id: entry for entry in entries if entry.id in ids}


def cancel(ids: Iterable[str], cluster: Cluster, *options: str) -> None:
    """End jobs, or signal them with options of scancel. UserError where SLURM does not let them be ended."""
    if not (named := list(ids)):
        return
    done = call(["scancel", *options, *named], cluster)
    if done.returncode:
        raise UserError(f"scancel failed: {done.stderr.strip()}", f"try again, or `scancel {' '.join(named)}` yourself")


def call(command: list[str], cluster: Cluster, timeout: float = TIMEOUT) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands. UserError where it is not installed or does not answer in time."""
    try:
        return subprocess.run(
            command,
            env=os.environ | environment(cluster),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed here", "call this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} has not answered for {timeout:g} s", "try again later") from None
