"""The real trainer on a real SLURM cluster."""

import json
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scheduled import ROOT, ScriptedRun, slurm
from test_untidy import ftlaunch, in_queue, wait_until

from ftlaunch.cluster.vocabulary import Cluster
from ftlaunch.run.layout import RunDir

Launch = Callable[..., subprocess.CompletedProcess[str]]

RECIPE = """\
name = "{name}"
model = {{ path = "{model}", dtype = "fp32" }}
adapter = {{ kind = "lora" }}
[data.q]
path = "{rows}"
prompt = "{{question}}"
completion = "{{answer}}"
[[stage]]
kind = "sft"
data = "q"
steps = 80
batch_size = 4
save_every = 4
[[stage]]
kind = "merge"
[parallel]
strategy = "ddp"
device = "cpu"
nodes = 2
"""


def test_runs_that_are_disturbed_end_with_the_weights_of_a_calm_one(
    dev: Cluster, launch: Launch, tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Three at once, on the same nodes: one calm, one requeued, one stopped and resumed on a single node."""
    runs: dict[str, ScriptedRun] = {}
    for name in ("calm", "requeued", "moved"):
        recipe = tmp_path / f"{name}.toml"
        recipe.write_text(RECIPE.format(name=name, model=tiny_model, rows=rows_file))
        launch("run", recipe, "--cluster", "dev", "--run-dir", tmp_path / name)
        runs[name] = ScriptedRun(RunDir(tmp_path / name), dev)
    disturb = {
        "requeued": lambda: slurm("scontrol", "requeue", runs["requeued"].job),
        "moved": lambda: launch("stop", tmp_path / "moved"),
    }
    for _ in disturb.copy():
        name = next(name for name in _in_turn(disturb) if (runs[name].status.stages[0].step or 0) >= 5)
        disturb.pop(name)()
    assert runs["moved"].wait_for_end().state == "stopped"
    refused = launch("resume", tmp_path / "moved", "--nodes", "3", check=False)
    assert (refused.returncode, "4 rows cannot be shared out evenly over 3 processes" in refused.stderr) == (2, True)
    launch("resume", tmp_path / "moved", "--nodes", "1")
    for run in runs.values():
        assert run.wait_for_end(300).state == "done", run.told()
        assert (run.run.stage_dir("02-merge").model / "model.safetensors").exists()
    assert [len(ended["nodes"]) for ended in runs["moved"].ended()] == [2, 1]
    assert len(runs["requeued"].ended()) == 2
    calm, requeued, moved = (load_file(tmp_path / name / "01-sft/artifact/adapter_model.safetensors") for name in runs)
    assert all(torch.equal(requeued[name], calm[name]) for name in calm)
    assert all(torch.allclose(moved[name], calm[name], atol=1e-6) for name in calm)


SWEEP = """\
name = "swept"
model = {{ path = "{model}", dtype = "fp32" }}
adapter = {{ kind = "lora" }}
[data.q]
path = "{rows}"
prompt = "{{question}}"
completion = "{{answer}}"
test = 8
[[stage]]
kind = "sft"
data = "q"
steps = 12
batch_size = 4
evaluate_every = 6
[parallel]
strategy = "single"
device = "cpu"
[sweep.grid]
"adapter.rank" = [2, 4]
"stage.sft.learning_rate" = [1e-4, 1e-3]
"""


def test_a_sweep_that_is_killed_ends_with_the_table_of_a_local_one(
    dev: Cluster, launch: Launch, tiny_model: Path, rows_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Twelve runs, three at a time; the caller and a job are killed in the middle, and the same command finishes."""
    if not request.config.getoption("--all-trials"):
        pytest.skip("twelve runs, here and on the cluster, take minutes: `make sweep`")
    recipe, there = tmp_path / "swept.toml", tmp_path / "there"
    recipe.write_text(SWEEP.format(model=tiny_model, rows=rows_file))
    words = ["compare", recipe, "--seeds", "3", "--json", "--dir"]
    on_cluster = [*words, there, "--cluster", ROOT / "slurm/profiles/dev.toml", "--at-once", "3"]
    caller = ftlaunch(*on_cluster)
    wait_until(lambda: len([*there.glob("*/*/01-sft/result.json")]) >= 4, 300)
    caller.kill()
    caller.communicate()
    runs = [ScriptedRun(RunDir(folder), dev) for folder in sorted(there.glob("*/seed-*"))]
    wait_until(lambda: any(run.status.state == "running" for run in runs))
    working = next(run for run in runs if run.status.state == "running")
    slurm("scancel", *in_queue(working.run.path))
    wait_until(lambda: not in_queue(working.run.path))
    swept, local = (json.loads(launch(*call).stdout) for call in (on_cluster, [*words, tmp_path / "here"]))
    quality = [[one["quality"] for row in told for one in row["measures"]] for told in (swept, local)]
    assert len(quality[0]) == 12
    assert quality[0] == quality[1]
    attempts = sum(len(run.ended()) for run in runs)
    print(f"\n{len(runs)} runs in {attempts} attempts: {quality[0][0]} and so on, as the local sweep says")


def _in_turn(names: Collection[str], seconds: float = 300.0) -> Iterator[str]:
    """These, again and again, until the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield from names
        time.sleep(0.1)
