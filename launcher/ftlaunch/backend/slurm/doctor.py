"""Whether a cluster is fit for runs: asked of SLURM, and looked at on the compute nodes themselves."""

import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path

import msgspec
from msgspec import Struct

from ftlaunch.backend.slurm import probe
from ftlaunch.backend.slurm.probe import Finding
from ftlaunch.cluster import queue
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import UserError
from ftlaunch.run.files import sync_folder, write_atomic
from ftlaunch.run.provenance import PACKAGES

SKEW_SECONDS = 5.0
FREE_BYTES = 20 << 30
PROBE_SECONDS = 300.0
"""How long the probe may wait in the queue and run."""


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
    try:
        for look in (_controller, _accounting, partial(_admitted, nodes=nodes)):
            yield (check := look(cluster))
            if not check.passed:
                return
        yield from _on_nodes(cluster, nodes)
    except UserError as error:
        yield Check(what="SLURM", passed=False, found=error.message, remedy=error.remedy)


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


def _flags(cluster: Cluster, nodes: int) -> list[str]:
    """The profile's wishes as sbatch and srun both take them."""
    wishes: Mapping[str, object] = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "cpus-per-task": cluster.cpus_per_node,
        "mem": cluster.memory_per_node,
        "exclude": ",".join(cluster.exclude) or None,
    } | cluster.sbatch
    named = [f"--{key}" if value is True else f"--{key}={value}" for key, value in wishes.items() if value]
    return [*named, f"--nodes={nodes}", "--ntasks-per-node=1"]


def _admitted(cluster: Cluster, nodes: int) -> Check:
    """Whether SLURM would take a job such as a stage's."""
    limit = f"--time={cluster.time_limit}"
    done = queue.call(["sbatch", "--test-only", *_flags(cluster, nodes), limit, "--wrap=true"], cluster)
    said = done.stderr.strip().removeprefix("sbatch: ")
    remedy = "" if done.returncode == 0 else "correct the profile, or ask for fewer --nodes"
    return Check(what="partition, account, limits", passed=done.returncode == 0, found=said, remedy=remedy)


def _on_nodes(cluster: Cluster, nodes: int) -> Iterator[Check]:
    folder = Path(tempfile.mkdtemp(prefix=".ftlaunch-doctor-", dir=Path.cwd()))
    try:
        write_atomic(folder / probe.TOKEN, secrets.token_hex())
        said = _probe(cluster, nodes, folder)
        sync_folder(folder)
        findings, skews = _read(folder)
        ran = len(findings) == nodes
        remedy = "" if ran else f"is {folder.parent} shared, and {sys.executable} there on every node? {said}"
        yield Check(what="probe", passed=ran, found=f"{len(findings)} of {nodes} nodes answered", remedy=remedy)
        for finding, skew in zip(findings, skews, strict=True):
            yield from _node(finding, skew, cluster)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _probe(cluster: Cluster, nodes: int, folder: Path) -> str:
    """Run the probe on every node and return what srun had to say."""
    interface = [cluster.interface] if cluster.interface else []
    program = [sys.executable, "-P", "-m", "ftlaunch.backend.slurm.probe", str(folder), *interface]
    command = ["srun", *_flags(cluster, nodes), "--time=0:05:00", "--immediate=120", "--kill-on-bad-exit=1"]
    return queue.call([*command, *cluster.srun, *program], cluster, timeout=PROBE_SECONDS).stderr.strip()


def _read(folder: Path) -> tuple[list[Finding], list[float]]:
    """What the nodes found, and how far each node's clock is from the file system's (seconds)."""
    files = sorted(folder.glob("node*.json"))
    findings = [msgspec.json.decode(file.read_bytes(), type=Finding) for file in files]
    skews = [abs(file.stat().st_mtime - finding.time) for file, finding in zip(files, findings, strict=True)]
    return findings, skews


def _node(finding: Finding, skew: float, cluster: Cluster) -> Iterator[Check]:
    """What there is to say of one node."""
    differing = [
        f"{name} {version or 'missing'}, here {here}"
        for name, version in finding.packages.items()
        if version != (here := _installed(name))
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


def _installed(package: str) -> str:
    assert package in PACKAGES
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
