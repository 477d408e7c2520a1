"""The real trainer on a real SLURM cluster."""

import subprocess
from collections.abc import Callable
from pathlib import Path

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


def test_a_requeued_run_ends_with_the_weights_of_a_calm_one(
    dev: Cluster, launch: Launch, tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Both at once, on the same nodes."""
    runs: dict[str, Acted] = {}
    for name in ("calm", "disturbed"):
        recipe = tmp_path / f"{name}.toml"
        recipe.write_text(RECIPE.format(name=name, model=tiny_model, rows=rows_file))
        launch("run", recipe, "--cluster", "dev", "--run-dir", tmp_path / name)
        runs[name] = Acted(RunDir(tmp_path / name), dev)
    runs["disturbed"].wait_for_step(5, seconds=200)
    slurm("scontrol", "requeue", runs["disturbed"].job)
    for run in runs.values():
        assert run.wait_for_end(300).state == "done", run.told()
    assert len(runs["disturbed"].ended()) == 2
    weights = [(tmp_path / name / "01-sft/artifact/adapter_model.safetensors").read_bytes() for name in runs]
    assert weights[0] == weights[1]
