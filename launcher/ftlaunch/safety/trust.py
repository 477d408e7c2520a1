"""Whose files may be loaded or run.

The rule: what is executed or deserialised (run folders with their plans and checkpoints, models, adapters, chat
templates, GGUF files) belongs to you or to root, nobody else may write it, and it does not lie where anybody at all
could swap it: below a folder that everyone may write and that is not sticky, as /tmp is. Links are judged by what they
lead to. Data files are parsed and never run, so they may be anyone's; nor does it matter that a group shares a folder
further up, since what its members put there would be theirs.
"""

import os
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from ftlaunch.errors import UserError

ROOT = 0


def require(path: Path, *, deep: bool = False) -> None:
    """Raise UserError unless the file, or the folder and its files, may be loaded; `deep` also checks subfolders.

    Raises UserError with what is wrong and the command that mends it. What does not exist is nobody's.
    """
    seen: set[Path] = set()
    for each in _loaded(path, seen, deep=deep):
        _require_owner(each)
    # Only now: `seen` is complete once the generator above has ended.
    for above in {above for each in seen for above in each.parents}:
        _require_unswappable(above)


def write_for_ourselves() -> None:
    """Have this process and its children make nothing that others may write, whatever the umask was."""
    # A umask can only be read by setting one. A stricter one of the user's is kept.
    os.umask(os.umask(0o022) | 0o022)


def require_place(path: Path) -> None:
    """Raise UserError where a folder made at a path could be swapped by anybody."""
    for above in path.resolve().parents:
        _require_unswappable(above)


def _loaded(path: Path, seen: set[Path], *, deep: bool) -> Iterator[Path]:
    """What is loaded with a path, links resolved: itself, and what is right in it or anywhere below it."""
    real = path.resolve()
    if real in seen:
        return
    seen.add(real)
    yield real
    for child in sorted(real.iterdir()) if real.is_dir() else ():
        if child.is_symlink() and child.is_file():
            yield from _loaded(child.resolve().parent, seen, deep=False)  # whoever may write there may swap the file
        elif deep or child.is_file():
            yield from _loaded(child, seen, deep=deep)


def _require_owner(path: Path) -> None:
    try:
        status = path.stat()
    # A link that leads nowhere, or a file removed since it was listed: there is nothing to load.
    except FileNotFoundError:
        return
    if status.st_uid not in (os.geteuid(), ROOT):
        raise UserError(
            f"{path} belongs to {_name(status.st_uid)}, and what is loaded or run must belong to you or root",
            f"copy it to a folder of your own, or take it over: chown -R {_name(os.geteuid())} {path}",
        )
    by_group = bool(status.st_mode & stat.S_IWGRP) and not _is_private_group(status.st_gid, status.st_uid)
    may_write = {"its group": by_group, "everyone": bool(status.st_mode & stat.S_IWOTH)}
    if others := [who for who, may in may_write.items() if may]:
        raise UserError(
            f"{path} can be written by {' and '.join(others)}, and only you may change what is loaded or run",
            f"chmod -R go-w {path}",
        )


def _require_unswappable(folder: Path) -> None:
    mode = folder.stat().st_mode if folder.exists() else 0
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise UserError(
            f"everyone may write to {folder}, and so could swap what is loaded or run from below it",
            f"chmod o-w {folder} (or chmod +t, where it is meant for everyone), or use another folder",
        )


@lru_cache
def _is_private_group(group_id: int, user_id: int) -> bool:
    """Whether a group is a user's own, as Debian and Fedora make one for each: nobody else has its rights."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(group_id), pwd.getpwuid(user_id)
    except KeyError:
        return False
    return (group_id, group.gr_name) == (user.pw_gid, user.pw_name) and set(group.gr_mem) <= {user.pw_name}


def _name(user_id: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(user_id).pw_name
    except KeyError:
        return str(user_id)
