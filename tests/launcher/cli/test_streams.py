"""Odd shells: streams that are closed, full or of another encoding, and a working directory that is gone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CALL = f"{sys.executable} -m ftlaunch"


def shell(line: str, folder: Path, **variables: str) -> tuple[int, str]:
    """Exit code and output of a line of sh; `$FTLAUNCH` calls the command line."""
    env = {**os.environ, "FTLAUNCH": CALL, **variables}
    done = subprocess.run(["sh", "-c", line], cwd=folder, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("$FTLAUNCH recipes >&-", 0, ""),
        ("$FTLAUNCH validate none.toml >&- 2>&-", 2, ""),
        ("$FTLAUNCH recipes >/dev/full", 2, "cannot be written: No space left on device"),
        ("mkdir gone && cd gone && rmdir ../gone && $FTLAUNCH recipes", 2, "error: the working directory is gone"),
        ("PYTHONIOENCODING=ascii $FTLAUNCH validate none.toml", 2, "\\u2192 correct the path"),
    ],
)
def test_an_odd_shell_is_no_traceback(line: str, code: int, said: str, tmp_path: Path) -> None:
    rc, told = shell(line, tmp_path)
    assert rc == code
    assert said in told
    assert "Traceback" not in told
    assert bool(told) == bool(said)
