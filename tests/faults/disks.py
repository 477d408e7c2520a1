"""Disks that fail for real: a mounted one of a few kilobytes, which may also be made read-only."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Disk:
    """A file system of its own at a path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, kilobytes: int) -> None:
        self._mount(f"remount,size={kilobytes}k")

    def make_readonly(self, *, readonly: bool = True) -> None:
        self._mount("remount,ro" if readonly else "remount,rw")

    def _mount(self, options: str) -> None:
        subprocess.run(["mount", "-o", options, str(self.path)], check=True)


@contextmanager
def mounted(path: Path, kilobytes: int) -> Iterator[Disk]:
    """A disk at the path, which is made; what is on it is lost at the end. Skips where it cannot be mounted."""
    path.mkdir(parents=True)
    if os.geteuid() != 0:
        pytest.skip("a disk of limited size can only be mounted by root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "ftlaunch-test", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"a disk of limited size cannot be mounted here: {done.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
