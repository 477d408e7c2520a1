"""What all tests of the launcher share."""

import os
import sys
from collections.abc import Callable

import pytest

from ftlaunch import cli

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here can tell whether files have reached the disk, and waiting for it takes seconds in all."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs a command line in this process; gives its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["ftlaunch", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run
