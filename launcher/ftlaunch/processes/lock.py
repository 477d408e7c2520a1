"""Only one process drives a run: a lock that the kernel lets go of with its holder, however that one ends."""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager

import msgspec

from ftlaunch.errors import UserError
from ftlaunch.processes import Identity, identify
from ftlaunch.run.layout import RunDir


def take(run: RunDir) -> int:
    """The lock of a run, as a file descriptor to be closed. UserError where another process drives it already."""
    try:
        # O_CLOEXEC: a rank that inherited the lock and outlived the driver would keep the run locked.
        descriptor = os.open(run.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(
            f"{run.path} cannot be written: {error.strerror}", "make room, or mend the disk or the folder's permissions"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        who = holder(run)
        driver = f" (process {who.pid} on {who.host})" if who else ""
        raise UserError(
            f"{run.path.name} is already running{driver}",
            f"watch it with `ftlaunch logs -f {run.in_shell}`, end it with `ftlaunch stop {run.in_shell}`",
        ) from None
    except OSError as error:
        os.close(descriptor)
        # Lustre mounted without the option flock, for example, answers ENOSYS.
        raise UserError(
            f"{run.lock} cannot be locked: {error.strerror}", "put the run on another file system with --run-dir"
        ) from error
    try:
        name_holder(descriptor, os.getpid())
    except OSError as error:
        os.close(descriptor)
        raise UserError(f"{run.lock} cannot be written: {error.strerror}", "make room, or mend the disk") from error
    return descriptor


def name_holder(descriptor: int, pid: int) -> None:
    """Write who drives the run into its lock."""
    content = msgspec.json.encode(identify(pid))
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)


def release(descriptor: int) -> None:
    """Sign off, for those who cannot see this machine's processes, and let go of a lock."""
    # Emptied while it is still locked: after close() another process may have written its own name.
    os.ftruncate(descriptor, 0)
    os.close(descriptor)


@contextmanager
def hold(run: RunDir) -> Generator[None]:
    """Within, the lock of a run is taken. UserError where another process drives it already."""
    descriptor = take(run)
    try:
        yield
    finally:
        release(descriptor)


def holder(run: RunDir) -> Identity | None:
    """Who drives the run, or did so until its death; None where nobody does."""
    try:
        return msgspec.json.decode(run.lock.read_bytes(), type=Identity)
    except (FileNotFoundError, msgspec.DecodeError):
        return None  # empty: signed off, or about to sign on
