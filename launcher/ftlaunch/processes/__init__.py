"""Processes of a run: who they are, whether they still live, and ending all of them.

Torch elastic starts every rank in a session of its own, so no process group holds an attempt together. What does is
`FTLAUNCH_ATTEMPT`: a child inherits it, whatever session it is in and whoever its parent is by now.
"""

import contextlib
import os
import re
import signal
import socket
import time
from pathlib import Path

from msgspec import Struct

from ftlaunch.run.layout import ATTEMPT

CPU_TIME_FIELDS = slice(13, 15)
START_TIME_FIELD = 22
PROC = Path("/proc")
RANK = re.compile(rb"\0RANK=(\d+)\0")


class Identity(Struct, frozen=True, kw_only=True):
    """One process, told apart from a later one that was given the same number."""

    host: str
    pid: int
    start_time: int
    """Field 22 of /proc/PID/stat: clock ticks after boot."""
    boot_id: str


def identify(pid: int) -> Identity:
    """Who a living (or not yet waited for) process of this machine is. OSError where there is none."""
    boot_id = (PROC / "sys/kernel/random/boot_id").read_text().strip()
    start_time = int(_stat(pid)[START_TIME_FIELD - 1])
    return Identity(host=socket.gethostname(), pid=pid, start_time=start_time, boot_id=boot_id)


def is_alive(identity: Identity) -> bool | None:
    """Whether that very process runs; None where it was started on another host and cannot be seen from here."""
    if identity.host != socket.gethostname():
        return None
    try:
        # A zombie (Z) keeps its pid and its start time until its parent waits for it, but does nothing any more.
        return identify(identity.pid) == identity and _stat(identity.pid)[2] not in {"Z", "X"}
    except OSError:
        return False


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat, the first at index 0. A command may hold blanks and brackets: the last one ends it."""
    text = (PROC / str(pid) / "stat").read_text()
    start, _, rest = text.rpartition(")")
    return [*start.split("(", 1), *rest.split()]


def of_attempts(path: Path, *, spare: int | None = None) -> list[int]:
    """Living processes but one, anyone's children by now, that were started for an attempt at or below a folder."""
    # A NUL ends each variable in /proc/PID/environ. Without NUL and slash, runs/a would also match runs/ab.
    exactly = f"{ATTEMPT}={path.resolve()}\0".encode()
    below = f"{ATTEMPT}={path.resolve()}/".encode()
    return [
        pid
        for pid in sorted(map(int, filter(str.isdigit, os.listdir(PROC))))  # noqa: PTH208 (twice as fast, on a polled path)
        if pid != spare and (exactly in (environ := _environ(pid)) or below in environ)
    ]


def _environ(pid: int) -> bytes:
    try:
        return (PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return b""  # gone meanwhile, or another user's


def ranks_of(path: Path, ranks: range) -> dict[int, int]:
    """The process of each rank of an attempt on this machine, as far as it is alive.

    A rank's own children, such as the one that writes checkpoints, inherit its number, so the oldest counts. A lone
    rank has no number: it is the child of the launching process, which is the oldest, or that one itself.
    """
    pids = sorted(of_attempts(path), key=_started)
    numbered: dict[int, int] = {}
    for pid in pids:
        # RANK= may be the first variable, with no NUL before it.
        found = RANK.search(b"\0" + _environ(pid))
        if found and int(found[1]) in ranks:
            numbered.setdefault(int(found[1]), pid)
    return numbered or ({ranks[0]: pids[:2][-1]} if pids and len(ranks) == 1 else {})


def _started(pid: int) -> float:
    """Clock ticks from boot to the start of a process, as its number says nothing: numbers are used again."""
    try:
        return int(_stat(pid)[START_TIME_FIELD - 1])
    except OSError:
        return float("inf")


def state(pid: int) -> str:
    """The kernel's letter for what a process does; X where there is none."""
    try:
        return _stat(pid)[2]
    except OSError:
        return "X"


def work_of(pids: list[int]) -> int | None:
    """What processes have done so far: clock ticks of CPU time, and one for every 64 KiB that was read or written.

    None where one of them waits for a disk, and may be doing more than can be seen.
    """
    done = 0
    for pid in pids:
        try:
            stat, io = _stat(pid), (PROC / str(pid) / "io").read_text().split()
        except OSError:
            continue  # gone meanwhile
        if stat[2] == "D":
            return None
        # io is "rchar: 4096 wchar: 512 …": the bytes that read() and write() moved, whether or not a disk was involved.
        done += sum(map(int, stat[CPU_TIME_FIELDS])) + (int(io[1]) + int(io[3])) // 2**16
    return done


def end(path: Path, *, grace: float = 0.0, spare: int | None = None) -> list[int]:
    """SIGKILL what `of_attempts` finds and outlives the grace (seconds), but for one; returns what even that left."""
    deadline = time.monotonic() + grace
    while (alive := of_attempts(path, spare=spare)) and time.monotonic() < deadline:
        time.sleep(0.05)
    deadline = time.monotonic() + 5
    # More than once: a process may fork after it was listed. One that is stuck in the kernel (D) outlives even this.
    while alive and time.monotonic() < deadline:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):  # it left by itself
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
        alive = of_attempts(path, spare=spare)
    return alive
