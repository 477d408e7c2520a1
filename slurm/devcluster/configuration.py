"""The files that the daemons are started with, all below one folder."""

import json
import os
import pwd
import secrets
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

STATE = Path("/tmp/ftlaunch-devcluster")
"""Everything that a cluster leaves on disk. `slurm/profiles/dev.toml` names the slurm.conf in it."""
CONF = STATE / "slurm.conf"
LAYOUT = STATE / "layout.json"
BRIDGE_ADDRESS = "10.77.0.254"
CONTROLLER_PORT, NODE_PORT, DATABASE_DAEMON_PORT, DATABASE_PORT = 16817, 16818, 16819, 13306
FIRST_LOCAL_PORT = 16820
"""First port of the nodes that share this host's address."""
CPUS = 4
"""CPUs that a node claims to have, so that several jobs fit on it."""


@dataclass(frozen=True)
class Layout:
    """What a cluster consists of."""

    nodes: int
    accounting: bool
    network: bool
    """Whether each node has a network namespace, and so an address, a host name and processes of its own."""

    def node_names(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.nodes + 1)]

    def addresses(self) -> dict[str, str]:
        return {name: f"10.77.0.{number}" for number, name in enumerate(self.node_names(), start=1)}


def read_layout() -> Layout | None:
    """The layout of the cluster that was started last; None where there is none."""
    if not LAYOUT.exists():
        return None
    return Layout(**json.loads(LAYOUT.read_text()))


def write_configuration(layout: Layout) -> None:
    """Write every file that is not there yet."""
    STATE.mkdir(mode=0o755, exist_ok=True)
    assert STATE.stat().st_uid == os.geteuid(), f"{STATE} belongs to another user"
    for name in ("log", "pid", "munge", "controller"):
        (STATE / name).mkdir(exist_ok=True)
    for name in layout.node_names():
        (STATE / f"spool-{name}").mkdir(exist_ok=True)
    _write_secret("munge/key", secrets.token_bytes(128))
    if layout.accounting:
        password = secrets.token_hex(16)
        _write_secret("slurmdbd.conf", _slurmdbd_conf(password).encode())
        _write_secret("grants.sql", _grants(password).encode())
    CONF.write_text(_slurm_conf(layout))
    (STATE / "hosts").write_text(_hosts(layout))
    LAYOUT.write_text(json.dumps(asdict(layout)))


def _write_secret(name: str, content: bytes) -> None:
    path = STATE / name
    if not path.exists():
        path.touch(mode=0o600)
        path.write_bytes(content)


def _hosts(layout: Layout) -> str:
    """What a node takes for /etc/hosts, as a site's name server would answer."""
    lines = ["127.0.0.1 localhost", f"{BRIDGE_ADDRESS} {socket.gethostname()}"]
    return "\n".join([*lines, *(f"{address} {name}" for name, address in layout.addresses().items())]) + "\n"


def _slurm_conf(layout: Layout) -> str:
    user = pwd.getpwuid(os.geteuid()).pw_name
    controller = BRIDGE_ADDRESS if layout.network else "127.0.0.1"
    kept = "job_comment,job_env,job_script" if layout.accounting else "job_comment"
    storage = "accounting_storage/slurmdbd" if layout.accounting else "accounting_storage/none"
    return f"""\
ClusterName=dev
SlurmctldHost={socket.gethostname()}({controller})
SlurmctldPort={CONTROLLER_PORT}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A job that was requeued waits as long as a credential lives.
AuthInfo=socket={STATE}/munge/socket,cred_expire=5
StateSaveLocation={STATE}/controller
SlurmdSpoolDir={STATE}/spool-%n
SlurmctldPidFile={STATE}/pid/slurmctld.own
SlurmdPidFile={STATE}/pid/%n.own
SlurmctldLogFile={STATE}/log/slurmctld
SlurmdLogFile={STATE}/log/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
# Faults are noticed in seconds rather than minutes.
SlurmdTimeout=8
SlurmctldTimeout=10
KillWait=20
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType={storage}
AccountingStorageHost=127.0.0.1
AccountingStoragePort={DATABASE_DAEMON_PORT}
AccountingStoragePass={STATE}/munge/socket
AccountingStoreFlags={kept}
{_nodes(layout)}
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60 MaxTime=1-0
PartitionName=urgent Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF MaxTime=1-0
"""


def _nodes(layout: Layout) -> str:
    size = f"CPUs={CPUS} RealMemory=4000 State=UNKNOWN"
    if layout.network:
        places = [f"{name} NodeAddr={address} Port={NODE_PORT}" for name, address in layout.addresses().items()]
    else:
        here = f"NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1"
        places = [f"{name} {here} Port={FIRST_LOCAL_PORT + at}" for at, name in enumerate(layout.node_names())]
    return "\n".join(f"NodeName={place} {size}" for place in places)


def _slurmdbd_conf(password: str) -> str:
    user = pwd.getpwuid(os.geteuid()).pw_name
    return f"""\
DbdHost={socket.gethostname()}
DbdAddr=127.0.0.1
DbdPort={DATABASE_DAEMON_PORT}
SlurmUser={user}
AuthType=auth/munge
AuthInfo=socket={STATE}/munge/socket
PidFile={STATE}/pid/slurmdbd.own
LogFile={STATE}/log/slurmdbd
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={DATABASE_PORT}
StorageUser=slurm
StoragePass={password}
"""


def _grants(password: str) -> str:
    return (
        f"CREATE USER IF NOT EXISTS slurm@'127.0.0.1' IDENTIFIED BY '{password}';\n"
        "GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';\n"
    )
