"""Runs on a real SLURM cluster whose ranks are scripted by worker.py."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec

from ftlaunch.backend import backends, runs
from ftlaunch.backend.prepare import prepare
from ftlaunch.backend.slurm import paths, queue, submit
from ftlaunch.backend.slurm.queue import Entry, read_job
from ftlaunch.backend.status import RunStatus
from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.plan.plan import Plan, PlannedStage
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.recipe.stages import Optimizer, Parallel, Sft
from ftlaunch.run.layout import RunDir
from ftlaunch.run.provenance import Provenance
from ftlaunch.run.spec import StageSpec
from ftlaunch.watch.status import read_status

NOWHERE = Provenance(
    recipe="gone.toml", commit=None, diff_sha256=None, packages={}, python="", platform="", host="", data={}
)
WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).parent.parent.parent


def devcluster(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "slurm/devcluster"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class ScriptedRun:
    """A submitted run of scripted stages."""

    run: RunDir
    cluster: Cluster

    @property
    def status(self) -> RunStatus:
        return read_status(self.run)

    @property
    def job(self) -> str:
        """Of the first stage."""
        return json.loads(paths.job(self.run.stage_dir("01-sft")).read_text())["id"]

    @property
    def jobs(self) -> set[str]:
        """Of all stages, those that may take over included."""
        return {id for stage_dir in self.run.stage_dirs() if (job := read_job(stage_dir)) for id in job.ids}

    def signal_task(self, node: int, number: signal.Signals) -> None:
        """Signal the process that looks after the ranks of a node."""
        mine = f"SLURM_JOB_ID={self.job}\0", f"SLURM_NODEID={node}\0", "SLURM_PROCID="
        found: dict[int, int] = {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if b"submitit" in (path / "cmdline").read_bytes():
                    variables = (path / "environ").read_text()
                    if all(text in variables for text in mine):
                        found[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        for pid, parent in found.items():
            if parent not in found:  # a copy of it stands guard over the ranks
                os.kill(pid, number)

    def wait(self, until: Callable[[RunStatus], bool], seconds: float = 60.0) -> RunStatus:
        """How the run stands once `until` is true of it."""
        deadline = time.monotonic() + seconds
        while not until(status := self.status):
            assert time.monotonic() < deadline, f"{status}\n{self.told()}"
            time.sleep(0.3)
        return status

    def wait_for_step(self, number: int, seconds: float = 60.0) -> None:
        self.wait(lambda status: (status.stages[0].step or 0) >= number, seconds)

    def wait_for_end(self, seconds: float = 90.0) -> RunStatus:
        """How the run stands once nothing of it waits or runs, and all has been said about it."""
        self.wait(lambda status: status.state not in ("queued", "waiting", "running"), seconds)
        return self.wait(lambda _: backends.of(self.run).is_over(self.run), 20)

    def wait_for_report(self, seconds: float = 60.0) -> None:
        """Until the last job has written the run's page, of which nobody but the job's end takes care."""
        self.wait(lambda _: (self.run.path / "report" / "index.html").exists(), seconds)

    def wait_for_accounts(self) -> dict[str, Entry]:
        """What the accounting says of the jobs, which it hears of a moment after their end."""
        deadline = time.monotonic() + 30
        while True:
            known, _ = queue._sacct(self.jobs, self.cluster)
            if len(known) == len(self.jobs) and not any(entry.alive for entry in known.values()):
                return known
            assert time.monotonic() < deadline, known
            time.sleep(0.5)

    def ended(self, stage: str = "01-sft") -> list[dict[str, Any]]:
        """What each attempt of a stage left; an empty one for attempts that were cut off."""
        attempts = self.run.stage_dir(stage).all_attempts()
        return [json.loads(paths.ended(one).read_text()) if paths.ended(one).exists() else {} for one in attempts]

    def told(self) -> str:
        logs = [*self.run.path.glob("*/jobs/*.out"), *self.run.path.glob("*/attempts/*/*.log")]
        return "\n".join(f"== {path}\n{path.read_text()}" for path in sorted(logs))

    def is_calm(self, stage: str = "01-sft") -> bool:
        """Whether a stage came to the very result that it has when nothing disturbs it."""
        stage_dir = self.run.stage_dir(stage)
        steps = int(next(p for p in json.loads(self.run.plan.read_text())["steps"] if p["name"] == stage)["command"][4])
        digest = ""
        for number in range(1, steps + 1):
            digest = sha256(f"{digest}{number}".encode()).hexdigest()
        return json.loads(stage_dir.result.read_text()) == {"digest": digest}


def submit_scripted(
    folder: Path, stages: tuple[str, ...], nodes: int, cluster: Cluster, constants: dict[str, float] | None = None
) -> ScriptedRun:
    """Write and submit a run with a stage for each text, such as "40 0.1 kill@3": worker.py's arguments.

    `constants` are those of a job's modules that it is to have otherwise, so that a test waits no longer than it must:
    `{"record.RECORD_SECONDS": 2.0}`.
    """
    run = write_scripted(folder, stages, nodes, cluster)
    for name, value in (constants or {}).items():
        module, _, constant = name.partition(".")
        file = paths.packages(run) / f"ftlaunch/backend/slurm/{module}.py"
        text, count = re.subn(rf"^{constant} = .+$", f"{constant} = {value}", file.read_text(), flags=re.MULTILINE)
        assert count == 1, name
        file.write_text(text)
    submit.submit(run, runs.read_plan(run))
    return ScriptedRun(run, cluster)


def write_scripted(folder: Path, stages: tuple[str, ...], nodes: int, cluster: Cluster | None) -> RunDir:
    """Write such a run, which `ftlaunch resume` would submit."""
    with patch("ftlaunch.run.provenance.collect", return_value=NOWHERE):
        return prepare(_plan(folder, nodes, stages), _Text(folder.parent / "recipe.toml"), backends.on(cluster))


class _Text(msgspec.Struct):
    """As much of a loaded recipe as is written down."""

    source: Path
    text: str = "# a recipe\n"
    is_for_here: bool = False


def _plan(run_dir: Path, nodes: int, stages: tuple[str, ...]) -> Plan:
    recipe = Recipe(name=run_dir.name, model=Model(path="m"), stage=[Sft(data="d")] * len(stages))
    planned = [_planned(recipe, f"{index:02d}-sft", nodes, text) for index, text in enumerate(stages, start=1)]
    return Plan(name=recipe.name, run_dir=str(run_dir), recipe=recipe, stages=planned)


def _planned(recipe: Recipe, name: str, nodes: int, text: str) -> PlannedStage:
    spec = StageSpec(
        name=recipe.name,
        stage=recipe.stage[0],
        model=recipe.model,
        adapter=recipe.adapter,
        optimizer=Optimizer(),
        parallel=Parallel(nodes=nodes),
        data={},
        seed=1,
        deterministic=False,
        world_size=nodes,
        training_hash="h",
    )
    command = [sys.executable, "-S", str(WORKER), name, *text.split(), "--machine_rank", "0"]
    files = {"step.json": msgspec.json.encode(spec).decode()}
    return PlannedStage(name=name, spec=spec, files=files, command=command, env={}, notes={})


def slurm(*command: str) -> str:
    """What one of SLURM's commands prints."""
    conf = {"SLURM_CONF": "/tmp/ftlaunch-devcluster/slurm.conf"}
    return subprocess.run(command, env=os.environ | conf, capture_output=True, text=True, check=False).stdout
