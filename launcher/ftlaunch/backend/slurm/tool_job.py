"""One of the trainer's tools, called on a node of a cluster as if it were called here."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from ftlaunch.backend.slurm import carried, paths, queue, reasons
from ftlaunch.backend.slurm.node_job import NodeJob
from ftlaunch.backend.slurm.submit import require_sbatch
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.errors import Interrupted, UserError
from ftlaunch.processes.signals import StopSignals
from ftlaunch.recipe.stages import Merge
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import RunDir
from ftlaunch.run.tail import Tail
from ftlaunch.tools import MergeOptions, ToolOptions

ANSWER, CODE, CALLED_IN, ALIVE, OPTIONS = "answer", "code.json", "called_in.json", "alive", "options.json"
DEAD_SECONDS, LOOK_SECONDS = 120.0, 0.5
"""A caller that gives no sign of life for so long is dead."""


def call(options: ToolOptions, cluster: Cluster) -> int:
    """Run the tool that the options are for on a node, in this very folder, and return its exit code.

    What it says comes through on stderr as it says it, its answer on stdout at its end. It ends with this process,
    by a signal (Interrupted) or, a while later, however else. UserError where it cannot be submitted, or ends without
    an answer.
    """
    require_sbatch()
    # In the working directory, which the node shares; /tmp is its own.
    folder = Path(tempfile.mkdtemp(prefix=".ftlaunch-tool-", dir=Path.cwd()))
    job = NodeJob(folder, cluster, 1, Merge() if isinstance(options, MergeOptions) else None)
    try:
        carried.keep(job.run_dir)
        write_json(folder / CALLED_IN, str(Path.cwd()))
        write_json(folder / OPTIONS, options)
        with StopSignals() as interrupts:
            job.submit(run_tool, str(folder), options.module)
            if said := job.wait(_Listener(job, interrupts).is_done):
                raise UserError(said, "look at the profile's setup, python, container and limits")
        print((folder / ANSWER).read_text(errors="replace"), end="", flush=True)
        return int((folder / CODE).read_text())
    finally:
        job.end()
        shutil.rmtree(folder, ignore_errors=True)


class _Listener:
    """Passes on what a job says, and says itself what the job waits for."""

    def __init__(self, job: NodeJob, interrupts: StopSignals) -> None:
        self._job = job
        self._interrupts = interrupts
        self._tail = Tail(paths.job_output(job.stage_dir, job.id or ""))
        self._last_said: str | None = None

    def is_done(self) -> bool:
        """Whether there is an answer, after all that was said so far was passed on; a sign of life is left."""
        if self._interrupts.wish != "go on":
            raise Interrupted(f"job {self._job.id} is ended", "call this again", self._interrupts.exit_code)
        (self._job.run_dir.path / ALIVE).touch()
        done = (self._job.run_dir.path / CODE).exists()
        self._say_why_not_yet()
        while lines := self._tail.read():
            for line in lines:
                # submitit's own log lines begin with its name.
                if not line.startswith("submitit "):
                    print(line, file=sys.stderr, flush=True)
        return done

    def _say_why_not_yet(self) -> None:
        entry = self._job.answer.entries.get(self._job.id or "")
        told = None if entry is None or entry.state != "PENDING" else reasons.why_waiting(entry.reason)
        if told is not None and told != self._last_said:
            print(f"job {self._job.id} {told}", file=sys.stderr, flush=True)
        self._last_said = told


def run_tool(name: str, module: str) -> None:
    """What the task on the node does: the tool's answer and exit code end up in the folder of that name."""
    folder = Path(name)
    run = RunDir(folder)
    cluster = queue.read_cluster(run)
    variables = os.environ | carried.kept(run, cluster) | cluster.environment
    command = [sys.executable, "-P", "-m", module, str(folder / OPTIONS)]
    with (folder / ANSWER).open("wb") as answer:
        called_in = msgspec.json.decode((folder / CALLED_IN).read_bytes(), type=str)
        process = subprocess.Popen(command, cwd=called_in, env=variables, stdin=subprocess.DEVNULL, stdout=answer)
        write_json(folder / CODE, _attend(process, folder / ALIVE))


def _attend(process: "subprocess.Popen[bytes]", alive: Path) -> int:
    """The exit code of a tool, which is ended where its caller gives no sign of life any more."""
    seen, since = 0.0, time.monotonic()
    while (code := process.poll()) is None:
        if (now := alive.stat().st_mtime if alive.exists() else 0.0) != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() - since > DEAD_SECONDS:
            process.kill()
        time.sleep(LOOK_SECONDS)
    return code
