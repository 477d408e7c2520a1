"""Ranks whose task is killed: by a process that is started and killed here, with one that lives on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftlaunch import processes
from ftlaunch.run.layout import ATTEMPT

TASK = """\
import subprocess, sys
from pathlib import Path
from ftlaunch.processes.guard import ended_with_this

with ended_with_this(Path(sys.argv[1])):
    variables = {{"{variable}": sys.argv[1]}}
    subprocess.Popen(["sleep", "300"], env=variables, stdout=subprocess.DEVNULL, start_new_session=True)
    print(flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [True, False])
def test_ranks_do_not_outlive_a_task_that_is_killed(tmp_path: Path, killed: bool) -> None:
    line = [sys.executable, "-c", TASK.format(variable=ATTEMPT), str(tmp_path)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as task:
        assert task.stdin is not None
        assert task.stdout is not None
        task.stdout.readline()
        (rank,) = processes.of_attempts(tmp_path)
        if killed:
            task.kill()
            while processes.of_attempts(tmp_path):
                time.sleep(0.05)
        else:
            task.stdin.close()
        assert task.stdout.read() == b""  # nobody holds its output open any more
    assert processes.of_attempts(tmp_path) == ([] if killed else [rank])
    if not killed:
        os.kill(rank, signal.SIGKILL)
