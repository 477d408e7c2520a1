"""A training run on two nodes of the devcluster through a storm of failures: `make storm`; `--minutes 2` for a sample.

A failure, chosen by a printed seed, strikes every thirty seconds, or once the run has saved again where that takes
longer: ftlaunch gives up a run that fails twice without a new checkpoint, and is meant to. The cluster is healed
after it. In the end the adapter is compared, byte by byte, with that of another run that nothing happened to.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from bisect import bisect
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

from msgspec import Struct
from tests.conftest import save_tiny_model, write_rows
from tests.faults.cluster_faults import CONF, DEVCLUSTER, FAULTS, find_target

from ftlaunch.backend.slurm import paths
from ftlaunch.backend.status import newest_checkpoint
from ftlaunch.run import progress
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import Attempt, RunDir, StageDir

EVERY_SECONDS = 30.0
STEPS_A_MINUTE = 20
"""About as many as two busy cores take in a minute of the storm."""
SETTLE_SECONDS = 60.0
"""A failure that has not ended an attempt by then has not disturbed it."""
POLL_SECONDS = 0.3
PATIENCE_SECONDS = 600.0
"""The run may take so long to go on after a failure."""
RECIPE = """\
name = "{name}"
seed = 5
deterministic = true
model = {{ path = "{model}", dtype = "fp32" }}
adapter = {{ kind = "lora", dropout = 0.1 }}
[data.q]
path = "{rows}"
prompt = "{{question}}"
completion = "{{answer}}"
[[stage]]
kind = "sft"
data = "q"
steps = {steps}
batch_size = 8
micro_batch_size = 4
save_every = 4
[parallel]
strategy = "{strategy}"
device = "cpu"
nodes = 2
"""
PROFILE = f"""\
slurm_conf = "{CONF["SLURM_CONF"]}"
partition = "main"
gpus = "none"
time_limit = "8:00:00"
signal_lead = 30
offline = true
hang_after = 15
max_restarts = 1000
"""


class Hit(Struct, frozen=True):
    """A failure, and how the run went on."""

    what: str
    time: float
    """Unix time of it, in seconds."""
    step: int
    """The last optimizer step before it."""
    attempt: int
    """The one that it struck."""
    restart: float
    """Seconds until the next step; 0 where the run was not disturbed."""


def main() -> int:
    """Print what struck, what became of it, and how much time was spent training; 1 where the adapters differ."""
    parser = argparse.ArgumentParser(prog="storm", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--steps", type=int, help="of the run; without it, as many as two busy cores take in that time")
    parser.add_argument("--again", type=Path, metavar="FOLDER", help="take the calm run that an earlier storm left")
    wanted = parser.parse_args()
    print(f"seed {wanted.seed}, {wanted.minutes:g} minutes, {wanted.strategy} on 2 of 3 nodes", flush=True)
    subprocess.run([sys.executable, str(DEVCLUSTER), "up", "--nodes", "3"], check=True, stdout=subprocess.DEVNULL)
    folder = wanted.again or Path(tempfile.mkdtemp(prefix="ftlaunch-storm-"))
    print(f"in {folder}, which stays where something is wrong", flush=True)
    if wanted.again:
        shutil.rmtree(folder / "stormy", ignore_errors=True)
        recipes = {name: folder / f"{name}.toml" for name in ("calm", "stormy")}
        calm = RunDir(folder / "calm").stage_dirs()[0]
    else:
        recipes = _write(folder, wanted)
        calm = _submit(recipes["calm"])
    _wait(calm, lambda: False, seconds=wanted.minutes * 60 + PATIENCE_SECONDS)
    pace = median(after["time"] - before["time"] for before, after in pairwise(_steps(calm)))
    print(f"calm run: {pace:.3f} s a step", flush=True)
    stormy = _submit(recipes["stormy"])
    hits = list(_storm(stormy, wanted.minutes * 60, random.Random(wanted.seed)))
    _wait(stormy, lambda: False, seconds=wanted.minutes * 60 + PATIENCE_SECONDS)
    print(_summary(stormy, hits))
    adapters = [(step.artifact / "adapter_model.safetensors").read_bytes() for step in (calm, stormy)]
    same = adapters[0] == adapters[1]
    print(f"final adapter: {'equal to the last bit' if same else 'NOT that of the calm run'}")
    if same:
        shutil.rmtree(folder)
    return 0 if same else 1


def _write(folder: Path, wanted: argparse.Namespace) -> dict[str, Path]:
    """The two recipes, which differ by name only."""
    model, rows = save_tiny_model(folder / "model"), write_rows(folder / "rows.jsonl")
    (folder / "site.toml").write_text(PROFILE)
    steps = wanted.steps or max(40, round(wanted.minutes * STEPS_A_MINUTE))
    paths = {name: folder / f"{name}.toml" for name in ("calm", "stormy")}
    for name, path in paths.items():
        path.write_text(RECIPE.format(name=name, model=model, rows=rows, steps=steps, strategy=wanted.strategy))
    return paths


def _submit(recipe: Path) -> StageDir:
    """The one stage of a recipe, submitted as a user does it."""
    run = RunDir(recipe.with_suffix(""))
    command = [sys.executable, "-m", "ftlaunch", "run", str(recipe), "--run-dir", str(run.path)]
    variables = os.environ | {"XDG_CACHE_HOME": str(recipe.parent / "cache"), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, "--cluster", str(recipe.with_name("site.toml"))], env=variables, capture_output=True, check=True
    )
    return run.stage_dirs()[0]


def _storm(stage_dir: StageDir, seconds: float, draw: random.Random) -> Iterator[Hit]:
    """Strike the run and see it go on, again and again, until the time is over or the run is."""
    _wait(stage_dir, lambda: newest_checkpoint(stage_dir) is not None)
    begun = due = time.time()
    while time.time() - begun < seconds and not stage_dir.result.exists():
        due = max(due + EVERY_SECONDS, time.time())
        _wait(stage_dir, lambda due=due: time.time() >= due)
        if hit := _strike(stage_dir, draw):
            yield hit
            print(f"{hit.time - begun:6.0f} s  {_describe(stage_dir, hit)}", flush=True)


def _strike(stage_dir: StageDir, draw: random.Random) -> Hit | None:
    """Strike the run and wait until it has taken a step again and saved; None where it has just ended."""
    strike = draw.choice(FAULTS)
    target = find_target(stage_dir, draw)
    if target is None:
        return None
    struck, number, taken = time.time(), target.attempt.number, _steps(stage_dir)[-1]["step"]
    what = strike(target)
    moved: list[float] = []

    def has_recovered() -> bool:
        """Whether another attempt has taken a step and saved, or the same one long after it was struck."""
        newest = stage_dir.all_attempts()[-1]
        since = _began(newest) if newest.number > number else struck + SETTLE_SECONDS
        moved.extend(entry["time"] for entry in progress.newest(stage_dir.metrics)[-1:] if entry["time"] > since)
        saved = newest_checkpoint(stage_dir)
        return bool(moved) and saved is not None and Path(saved, "manifest.json").stat().st_mtime > since

    _wait(stage_dir, has_recovered)
    disturbed = stage_dir.all_attempts()[-1].number > number
    return Hit(what, struck, taken, number, moved[0] - struck if disturbed and moved else 0.0)


def _began(attempt: Attempt) -> float:
    """When the processes of an attempt were started: unix time; that of a far future where they have not been."""
    return attempt.process.stat().st_mtime if attempt.process.exists() else float("inf")


def _steps(stage_dir: StageDir) -> list[progress.Entry]:
    """The metrics of each optimizer step, as the run has kept them."""
    return [entry for entry in read_jsonl(stage_dir.metrics) if not progress.is_evaluation(entry)]


def _wait(stage_dir: StageDir, until: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    """Until it is true or the stage has its result."""
    deadline = time.monotonic() + seconds
    while not until() and not stage_dir.result.exists():
        attempts = stage_dir.all_attempts()
        if attempts and paths.ended(attempts[-1]).exists():
            ended = json.loads(paths.ended(attempts[-1]).read_text())
            assert ended["restarted"] or ended["cause"] == "preempted", f"given up: {ended}"
        assert time.monotonic() < deadline, f"nothing has happened for {seconds:g} s"
        time.sleep(POLL_SECONDS)


def _describe(stage_dir: StageDir, hit: Hit) -> str:
    """A line that says what struck and how the run took it."""
    ended = paths.ended(stage_dir.all_attempts()[hit.attempt - 1])
    if not hit.restart:
        return f"attempt {hit.attempt}, step {hit.step}: {hit.what}: went on undisturbed"
    told = json.loads(ended.read_text())
    outcome = f"{told['cause']}: {told['reason']}"
    return f"attempt {hit.attempt}, step {hit.step}: {hit.what}: {outcome}; next step after {hit.restart:.0f} s"


def _summary(stage_dir: StageDir, hits: list[Hit]) -> str:
    """How much of the time, from the first step to the last, was spent on steps that were kept."""
    steps = _steps(stage_dir)
    starts = sorted(_began(attempt) for attempt in stage_dir.all_attempts())
    pairs = list(pairwise(entry["time"] for entry in steps))
    trained = sum(after - before for before, after in pairs if bisect(starts, before) == bisect(starts, after))
    wall = steps[-1]["time"] - steps[0]["time"]
    restart = mean([hit.restart for hit in hits] or [0.0])
    interval = wall / max(1, len(hits))
    return "\n".join(
        [
            f"{len(hits)} failures in {wall:.0f} s, one in {interval:.1f} s; restart {restart:.1f} s on average",
            f"time spent training {trained / wall:.1%}; such restarts allow {(interval - restart) / interval:.1%}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
