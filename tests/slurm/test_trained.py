"""The real trainer on a real SLURM cluster."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from scheduled import Acted, slurm

from ftlaunch.cluster import Cluster
from ftlaunch.rundir import RunDir

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
steps = 16
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
    runs: dict[str, Acted] = {}
    for name in ("calm", "requeued", "moved"):
        recipe = tmp_path / f"{name}.toml"
        recipe.write_text(RECIPE.format(name=name, model=tiny_model, rows=rows_file))
        launch("run", recipe, "--cluster", "dev", "--run-dir", tmp_path / name)
        runs[name] = Acted(RunDir(tmp_path / name), dev)
    runs["requeued"].wait_for_step(5, seconds=300)
    slurm("scontrol", "requeue", runs["requeued"].job)
    runs["moved"].wait_for_step(5, seconds=300)
    launch("stop", tmp_path / "moved", "--wait", "120")
    refused = launch("resume", tmp_path / "moved", "--nodes", "3", check=False)
    assert (refused.returncode, "4 rows cannot be shared out evenly over 3 processes" in refused.stderr) == (2, True)
    launch("resume", tmp_path / "moved", "--nodes", "1")
    for run in runs.values():
        assert run.wait_for_end(300).state == "done", run.told()
        assert (run.run.step_dir("02-merge").model / "model.safetensors").exists()
    assert [len(ended["nodes"]) for ended in runs["moved"].ended()] == [2, 1]
    assert len(runs["requeued"].ended()) == 2
    calm, requeued, moved = (load_file(tmp_path / name / "01-sft/artifact/adapter_model.safetensors") for name in runs)
    assert all(torch.equal(requeued[name], calm[name]) for name in calm)
    assert all(torch.allclose(moved[name], calm[name], atol=1e-6) for name in calm)
