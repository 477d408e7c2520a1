"""The real trainer on a real SLURM cluster."""

import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from scheduled import Acted, slurm

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
    runs: dict[str, Acted] = {}
    for name in ("calm", "requeued", "moved"):
        recipe = tmp_path / f"{name}.toml"
        recipe.write_text(RECIPE.format(name=name, model=tiny_model, rows=rows_file))
        launch("run", recipe, "--cluster", "dev", "--run-dir", tmp_path / name)
        runs[name] = Acted(RunDir(tmp_path / name), dev)
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


def _in_turn(names: Collection[str], seconds: float = 300.0) -> Iterator[str]:
    """These, again and again, until the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield from names
        time.sleep(0.1)
