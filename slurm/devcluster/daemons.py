"""Starting and ending the cluster's daemons, each in the foreground of a process that this module remembers."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import network
from configuration import CONF, CONTROLLER_PORT, DATABASE_DAEMON_PORT, DATABASE_PORT, STATE, Layout
from packages import SEARCH

READY_SECONDS = 60.0
STOP_SECONDS = 10.0


class Failed(Exception):
    """A daemon that did not start."""


def environment() -> dict[str, str]:
    """What SLURM's commands and daemons find their cluster by."""
    return os.environ | {"SLURM_CONF": str(CONF), "PATH": SEARCH}


def start(layout: Layout) -> None:
    """Start the daemons that do not run, each when what it leans on answers. Failed where one does not come up."""
    munge = STATE / "munge"
    _start(
        "munged",
        [
            *("munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket"),
            *(f"--pid-file={munge}/pid", f"--log-file={STATE}/log/munged", f"--seed-file={munge}/seed"),
        ],
        lambda: (munge / "socket").exists(),
    )
    if layout.accounting:
        _start_database()
    _start("slurmctld", ["slurmctld", "-D", "-f", str(CONF)], lambda: _listens(CONTROLLER_PORT))
    for name in layout.node_names():
        _start(name, _node_command(name, layout), lambda: True)


def _start_database() -> None:
    data = STATE / "database"
    if not data.exists():
        subprocess.run(
            ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--skip-test-db", *_database_user()],
            check=True,
            capture_output=True,
        )
    server = ["mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={STATE}/database.sock", *_database_user()]
    server += ["--bind-address=127.0.0.1", f"--port={DATABASE_PORT}", f"--init-file={STATE}/grants.sql"]
    _start("mariadbd", server, lambda: _listens(DATABASE_PORT))
    # slurmdbd knows its configuration only as the neighbour of slurm.conf.
    _start("slurmdbd", ["slurmdbd", "-D"], lambda: _listens(DATABASE_DAEMON_PORT))


def _database_user() -> list[str]:
    return ["--user=root"] if os.geteuid() == 0 else []


def _node_command(name: str, layout: Layout) -> list[str]:
    daemon = ["slurmd", "-D", "-N", name, "-f", str(CONF)]
    if not layout.network:
        return daemon
    # A shell that waits is the node's init: it collects orphans, and its end is the end of all that runs there.
    setup = f'hostname {name} && mount --bind {STATE}/hosts /etc/hosts && "$@" & wait $!'
    own = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts", "sh", "-c", setup, "init"]
    return ["nsenter", f"--net={network.NAMESPACES / network.namespace(name)}", *own, *daemon]


def _start(name: str, command: list[str], answers: Callable[[], bool]) -> None:
    if _pid(name) is not None:
        return
    program = shutil.which(command[0], path=SEARCH)
    assert program is not None, f"{command[0]} was there a moment ago"
    with (STATE / "log" / f"{name}.out").open("ab") as log:
        process = subprocess.Popen(
            [program, *command[1:]],
            env=environment(),
            cwd=STATE,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (STATE / "pid" / name).write_text(f"{process.pid} {_start_time(process.pid)}")
    deadline = time.monotonic() + READY_SECONDS
    while not answers():
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failed(f"{name} did not start: see {STATE}/log/{name}.out")
        time.sleep(0.05)


def _listens(port: int) -> bool:
    for address in ("127.0.0.1", network.BRIDGE_ADDRESS):
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex((address, port)) == 0:
                return True
    return False


def running() -> dict[str, int]:
    """The pid of each daemon that runs, by name; a node's is that of the process around its namespaces."""
    folder = STATE / "pid"
    names = sorted(path.name for path in folder.iterdir() if not path.suffix) if folder.is_dir() else []
    return {name: pid for name in names if (pid := _pid(name)) is not None}


def _pid(name: str) -> int | None:
    """Return the process id of a daemon that still runs, and None if the number is now another process's."""
    try:
        pid, started = (STATE / "pid" / name).read_text().split()
        return int(pid) if _start_time(int(pid)) == started else None
    except (OSError, ValueError):
        return None


def _start_time(pid: int) -> str:
    """Clock ticks from boot to the start of a living process. OSError where there is none."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if fields[0] in "ZX":
        raise ProcessLookupError(pid)
    return fields[19]


def stop() -> None:
    """End every daemon: nodes first and at once, with whatever runs on them."""
    for names, number in (
        ([name for name in running() if name.startswith("n")], signal.SIGKILL),
        (["slurmctld"], signal.SIGTERM),
        (["slurmdbd"], signal.SIGTERM),
        (["mariadbd", "munged"], signal.SIGTERM),
    ):
        _end([name for name in names if name in running()], number)


def _end(names: list[str], number: signal.Signals) -> None:
    for name in names:
        _signal(name, number)
    deadline = time.monotonic() + STOP_SECONDS
    while left := [name for name in names if _pid(name) is not None]:
        if time.monotonic() > deadline:
            number = signal.SIGKILL
        if number == signal.SIGKILL:
            for name in left:
                _signal(name, number)
        time.sleep(0.05)


def _signal(name: str, number: signal.Signals) -> None:
    pid = _pid(name)
    if pid is not None:
        os.kill(pid, number)
