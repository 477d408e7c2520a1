"""Whatever ends a run, `resume` goes on from the newest good checkpoint as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import Launch

from ftlaunch.errors import STAGE_FAILED, STOPPED
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import RunDir, StageDir

STEPS = 40
SETTINGS = [
    "--set",
    f"stage.sft.steps={STEPS}",
    "--set",
    "stage.sft.save_every=4",
    "--set",
    "stage.sft.evaluate_every=9",
]
KILLED_AFTER = 15


def strategy(name: str) -> list[str]:
    return ["--set", f"parallel.strategy={name}", "--set", "parallel.procs_per_node=2"]


def ranks_of(stage_dir: StageDir) -> dict[int, int]:
    """Pid of every rank that works in a step folder."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            values = dict(
                item.split(b"=", 1) for item in (folder / "environ").read_bytes().split(b"\0") if b"=" in item
            )
        except OSError:
            continue
        if b"fttrain" in words and values.get(b"FTLAUNCH_ATTEMPT", b"").startswith(os.fsencode(stage_dir.path)):
            found[int(values.get(b"RANK", b"0"))] = int(folder.name)
    return found


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ftlaunch", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(stage_dir: StageDir, number: int, process: subprocess.Popen[str]) -> None:
    while not any(line["step"] >= number for line in read_jsonl(stage_dir.metrics)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def without_times(stage_dir: StageDir) -> list[dict]:
    """All metrics but those that a clock or the memory allocator decides."""
    volatile = {"time", "tokens_per_second", "peak_memory_bytes"}
    return [
        {key: value for key, value in line.items() if key not in volatile} for line in read_jsonl(stage_dir.metrics)
    ]


def assert_same_end(calm: RunDir, other: RunDir, adapter: Callable[[StageDir], dict]) -> None:
    """Every metric of every step and every weight, to the last bit."""
    calm_step, step = calm.stage_dir("01-sft"), other.stage_dir("01-sft")
    assert without_times(step) == without_times(calm_step)
    ours, theirs = adapter(step), adapter(calm_step)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
def test_a_killed_rank_costs_nothing_but_time(
    name: str, tmp_path: Path, recipe: Callable[..., Path], launch: Launch, adapter: Callable
):
    path = recipe(dropout=0.1)
    calm, killed = RunDir(tmp_path / "calm"), RunDir(tmp_path / "killed")
    launch("run", path, *SETTINGS, *strategy(name), "--run-dir", calm.path)

    stage_dir = killed.stage_dir("01-sft")
    process = start("run", path, *SETTINGS, *strategy(name), "--run-dir", killed.path)
    wait_for_step(stage_dir, KILLED_AFTER, process)
    os.kill(ranks_of(stage_dir)[1], signal.SIGKILL)
    began = time.monotonic()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == STAGE_FAILED
    assert "rank 1" in said
    assert "SIGKILL" in said
    assert time.monotonic() - began < 20
    assert not ranks_of(stage_dir)
    assert not stage_dir.result.exists()

    launch("resume", killed.path)
    assert len(stage_dir.all_attempts()) == 2
    assert_same_end(calm, killed, adapter)


def test_stop_saves_and_resume_goes_on(tmp_path: Path, recipe: Callable[..., Path], launch: Launch, adapter: Callable):
    path = recipe(dropout=0.1)
    calm, stopped = RunDir(tmp_path / "calm"), RunDir(tmp_path / "stopped")
    launch("run", path, *SETTINGS, "--run-dir", calm.path)
    stage_dir = stopped.stage_dir("01-sft")

    process = start("run", path, *SETTINGS, "--run-dir", stopped.path)
    wait_for_step(stage_dir, 3, process)
    launch("stop", stopped.path)
    assert process.wait(timeout=60) == STOPPED
    told = json.loads(stage_dir.all_attempts()[-1].stopped.read_text())
    newest = max(stage_dir.checkpoints.glob("step-*"))
    assert newest.name == f"step-{told['step']:08d}"

    process = start("resume", stopped.path)
    wait_for_step(stage_dir, told["step"] + 3, process)
    os.kill(ranks_of(stage_dir)[0], signal.SIGTERM)
    assert process.wait(timeout=60) == STOPPED

    launch("resume", stopped.path)
    assert len(stage_dir.all_attempts()) == 3
    assert_same_end(calm, stopped, adapter)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, recipe: Callable[..., Path], launch: Launch, adapter: Callable
):
    path = recipe(dropout=0.1)
    run = RunDir(tmp_path / "run")
    launch("run", path, "--run-dir", run.path)
    stage_dir = run.stage_dir("01-sft")
    before = adapter(stage_dir)
    newest, older = sorted(stage_dir.checkpoints.glob("step-*"), reverse=True)
    damaged = bytearray((newest / "rank0.safetensors").read_bytes())
    damaged[-100] ^= 4
    (newest / "rank0.safetensors").write_bytes(damaged)
    stage_dir.result.unlink()

    launch("resume", run.path)
    log = stage_dir.all_attempts()[-1].rank_log(0).read_text()
    assert f"checkpoint {newest.name} is passed over: rank0.safetensors does not match its SHA-256" in log
    assert older.name == "step-00000004"
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter(stage_dir).items())
