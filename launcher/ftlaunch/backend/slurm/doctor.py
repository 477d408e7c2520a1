"""Whether a cluster is fit for runs: asked of SLURM, and looked at on the compute nodes themselves."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from ftlaunch.backend.slurm import probe, queue
from ftlaunch.backend.slurm.node_job import NodeJob
from ftlaunch.backend.slurm.probe import Finding
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import UserError
from ftlaunch.run.provenance import installed

TIME_LIMIT, SIGNAL_LEAD = "0:05:00", 10
PROBE_SECONDS = 300.0
"""How long the probe may wait in the queue and run."""
SKEW_SECONDS = 5.0
FREE_BYTES = 20 << 30


class Check(Struct, frozen=True, kw_only=True):
    """One thing that was looked at."""

    what: str
    passed: bool
    found: str
    remedy: str = ""
    node: str | None = None
    """The node that it is about, if it is about one."""


def examine(cluster: Cluster, nodes: int) -> Iterator[Check]:
    """Check after check, as each is done; the later ones need the earlier, and where these fail are left out."""
    # Not in /tmp, which each node has for itself.
    folder = Path(tempfile.mkdtemp(prefix=".ftlaunch-doctor-", dir=Path.cwd()))
    try:
        for look in (_controller, _accounting):
            yield (check := look(cluster))
            if not check.passed:
                return
        job = NodeJob(folder, cluster, nodes)
        yield (check := _admitted(job))
        if check.passed:
            yield from _on_nodes(job)
    except UserError as error:
        yield Check(what="SLURM", passed=False, found=error.message, remedy=error.remedy)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _controller(cluster: Cluster) -> Check:
    done = queue.call(["scontrol", "ping"], cluster)
    version = queue.call(["sinfo", "--version"], cluster).stdout.strip()
    up = done.returncode == 0 and "UP" in done.stdout
    remedy = "" if up else "ask the site, or correct slurm_conf in the profile"
    return Check(what="controller", passed=up, found=f"{version}: {done.stdout.strip()}", remedy=remedy)


def _accounting(cluster: Cluster) -> Check:
    done = queue.call(["sacct", "--noheader", "--allocations", "--starttime=now"], cluster)
    found = "on" if done.returncode == 0 else "off: jobs that SLURM has forgotten are told from their folders alone"
    return Check(what="accounting", passed=True, found=found)


def _admitted(job: NodeJob) -> Check:
    """Whether SLURM would take a job such as a stage's: asked with a stage's own batch script."""
    accepted, said = job.is_admitted()
    cpus = "" if job.cluster.cpus_per_node else "; without cpus_per_node a node gives the site's default, often one CPU"
    remedy = "" if accepted else "correct the profile, or ask for fewer --nodes"
    return Check(what="partition, account, limits", passed=accepted, found=f"{said}{cpus}", remedy=remedy)


def _on_nodes(job: NodeJob) -> Iterator[Check]:
    said = _probe(job)
    findings, skews = _read(job.run_dir.path)
    ran = len(findings) == job.nodes
    found = f"{len(findings)} of {job.nodes} nodes answered"
    remedy = "see setup, python and container in the profile, and whether this folder is shared"
    yield Check(what="probe", passed=ran, found=found if ran else f"{found}: {said}", remedy="" if ran else remedy)
    for finding, skew in zip(findings, skews, strict=True):
        yield from _node(finding, skew, job.cluster)


def _probe(job: NodeJob) -> str:
    """Have every node looked at, soon and shortly, and return what the job said where one was not."""
    folder, cluster = job.run_dir.path, job.cluster
    (folder / probe.TOKEN).touch()
    # The time limit of a [stage.sft] table would win over the short one below.
    stages = {kind: msgspec.structs.replace(own, time_limit=None) for kind, own in cluster.stage.items()}
    soon = msgspec.structs.replace(cluster, time_limit=TIME_LIMIT, signal_lead=SIGNAL_LEAD, stage=stages)
    try:
        job.submit(probe.look, str(folder), cluster.interface, cluster=soon)
        return job.wait(lambda: len([*folder.glob("node*.json")]) == job.nodes, PROBE_SECONDS)
    finally:
        job.end()


def _read(folder: Path) -> tuple[list[Finding], list[float]]:
    """What the nodes found, and how far each node's clock is from the file system's (seconds)."""
    files = sorted(folder.glob("node*.json"))
    findings = [msgspec.json.decode(file.read_bytes(), type=Finding) for file in files]
    # The file server sets st_mtime by its clock; the node wrote its own into the finding.
    skews = [abs(file.stat().st_mtime - finding.time) for file, finding in zip(files, findings, strict=True)]
    return findings, skews


def _node(finding: Finding, skew: float, cluster: Cluster) -> Iterator[Check]:
    """Return the findings on one node."""
    ours = installed()
    differing = [
        f"{name} {version or 'missing'}, here {ours[name]}"
        for name, version in finding.packages.items()
        if version != ours[name]
    ]
    here = sys.version.split()[0]
    if finding.python != here:
        differing.append(f"python {finding.python}, here {here}")
    gpus = ": ".join([f"{len(finding.gpus)} seen", *sorted({*finding.gpus})])
    wants_gpu = cluster.gpus != "none"
    facts = [
        ("python and packages", not differing, "; ".join(differing) or "as here", "install into a shared environment"),
        ("shared folder", finding.shared, "seen" if finding.shared else "not seen", "run in a folder that is shared"),
        ("first node reachable", finding.meets is None, finding.meets or "yes", "name the network with `interface`"),
        ("all-reduce", finding.reduces, finding.reduced, "name the network with `interface`"),
        ("clock", skew <= SKEW_SECONDS, f"{skew:.1f} s from the file system's", "have the site mend it"),
        ("disk", finding.free_bytes > FREE_BYTES, f"{finding.free_bytes >> 30} GiB free", "make room for checkpoints"),
        ("scontrol", finding.scontrol, "there" if finding.scontrol else "missing", 'set restart = "successor"'),
        ("GPU", bool(finding.gpus) or not wants_gpu, gpus, 'correct `gpus`, or set gpus = "none"'),
    ]
    for what, passed, found, remedy in facts:
        remedy = "" if passed else remedy
        yield Check(what=f"{finding.node}: {what}", passed=passed, found=found, remedy=remedy, node=finding.node)
