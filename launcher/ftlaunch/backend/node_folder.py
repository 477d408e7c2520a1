"""A folder of one node for as long as an attempt lives there: its ranks' signs of life, and arrays that they share.

It is on the node's own disk or in its memory, as thousands of ranks must not touch files of a shared file system all
along.
"""

import os
import shutil
import socket
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ftlaunch.errors import UserError

PREFIX = "ftlaunch-"


@contextmanager
def node_folder() -> Generator[Path]:
    """The folder, for its owner only; those whose processes were killed before they could remove them go, too.

    UserError where it cannot be made.
    """
    _clear_leftovers()
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{_mine()}{os.getpid()}-"))
    except OSError as error:
        message = f"{tempfile.gettempdir()} of {socket.gethostname()} cannot be written: {error.strerror}"
        raise UserError(message, "make room there, or exclude the node") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _mine() -> str:
    """How the names of this machine's folders begin; a temporary folder may be one that several machines share."""
    return f"{PREFIX}{socket.gethostname()}-"


def _clear_leftovers() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_mine()}*"):
        # A name is ftlaunch-HOST-PID-RANDOM: the folder is in use as long as its maker, PID, is alive.
        pid = folder.name.removeprefix(_mine()).partition("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists() and folder.stat().st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)
