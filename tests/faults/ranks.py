"""Ranks of a step, started again and again from one process that has done the imports."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
from tests.faults.rank_faults import Fault

from ftlaunch.backend.folders import write_files
from ftlaunch.plan.plan import make_plan
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.run.layout import RunDir, StageDir


class Ranks:
    """Starts the ranks of a step and tells how they ended. One step at a time."""

    def __init__(self, cache: Path, **environment: str) -> None:
        """`cache` is where tokens are kept; the keywords are added to every rank's environment."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 it is closed with the process
        self._forker = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.rank_forker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1", **environment},
            start_new_session=True,
        )
        self.pids: list[int] = []

    def start(self, stage_dir: StageDir, *faults: Fault) -> None:
        """Start an attempt of the step in a written run folder, with faults to come."""
        spec = stage_dir.read_spec()
        order = {
            "step": str(stage_dir.path),
            "attempt": str(stage_dir.new_attempt().path),
            "world_size": spec.world_size,
        }
        assert self._forker.stdin is not None
        self._forker.stdin.write(json.dumps({**order, "port": _free_port(), "faults": faults}) + "\n")
        self._forker.stdin.flush()
        self.pids = self._answer()

    def wait(self) -> list[int]:
        """Exit codes of all ranks, the negative signal where one was killed."""
        return [os.waitstatus_to_exitcode(status) for status in self._answer()]

    def run(self, stage_dir: StageDir) -> None:
        """Run the step to its end."""
        self.start(stage_dir)
        codes = self.wait()
        assert not any(codes), f"{codes}\n{said(stage_dir)}"

    def kill(self, rank: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was done
            os.kill(self.pids[rank], signal.SIGKILL)

    def _answer(self) -> list[int]:
        assert self._forker.stdout is not None
        line = self._forker.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(self._log.read().decode())
        return json.loads(line)

    def close(self) -> None:
        assert self._forker.stdin is not None
        self._forker.stdin.close()
        self._forker.wait()
        self._log.close()


def said(stage_dir: StageDir) -> str:
    """What the ranks of the newest attempt wrote."""
    return "\n".join(path.read_text() for path in stage_dir.all_attempts()[-1].rank_logs().values())


def write_run(recipe: Recipe, folder: Path) -> RunDir:
    """The folder of a run as `ftlaunch run` makes it, as far as ranks look at it; written over one that exists."""
    plan = make_plan(recipe, folder)
    run = RunDir(folder)
    for planned in plan.stages:
        run.stage_dir(planned.name).path.mkdir(parents=True, exist_ok=True)
        write_files(run, planned)
    return run


def with_parallel(recipe: Recipe, strategy: str, processes: int) -> Recipe:
    """The same recipe, with its work shared out in another way."""
    name = "single" if strategy == "ddp" and processes == 1 else strategy
    parallel = msgspec.structs.replace(recipe.parallel, strategy=name, procs_per_node=processes)
    return msgspec.structs.replace(recipe, parallel=parallel)


def _free_port() -> int:
    """A port that is likely to stay free until rank 0 binds it."""
    while True:
        # Not from the module's own generator, which a stage in this process seeds: two processes would take one port.
        port = random.SystemRandom().randint(20000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
