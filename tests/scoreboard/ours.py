"""ftlaunch: its stages in a process, and where processes are the point, its command line."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tests.conftest import save_tiny_model, write_rows
from tests.scoreboard import tiny
from tests.scoreboard.trial import Verdict
from tests.scoreboard.two_ranks import SEEN_WITHIN, SETTLE, wait

from ftlaunch.run.layout import RunDir, StageDir
from fttrain.checkpoint import manifest

RECIPE = """
name = "tiny"
[model]
path = "{model}"
dtype = "fp32"
[adapter]
kind = "lora"
[data.rows]
path = "{rows}"
prompt = "{{question}}"
completion = "{{answer}}"
[[stage]]
kind = "sft"
data = "rows"
steps = {steps}
save_every = 2
[parallel]
device = "cpu"
strategy = "{strategy}"
procs_per_node = {processes}
"""
CANARY = "hf_ScoreboardCanary0123456789abcdef"
SECRET_PRINTING = Path(__file__).parent.parent / "trainer/secret_printing"


class OurSaver:
    pickles = ("optimizer.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin")

    def __init__(self, place: Path) -> None:
        """`place` is where `make` has been, or will be."""
        self._model, self._rows = place / "model", place / "rows.jsonl"

    def make(self) -> str:
        """The model and the rows, which only a child may make: what has computed cannot be forked."""
        write_rows(self._rows)
        return str(save_tiny_model(self._model))

    def train(self, folder: Path, *, stop_at: int | None = None, steps: int = tiny.STEPS) -> str:
        from safetensors.torch import load_file
        from tests.trainer.in_process import make_data, make_step, train

        torch.set_num_threads(1)
        step = make_step(self._model, make_data(self._rows), steps=steps, save_every=tiny.SAVE_EVERY)
        done = train(step, folder, stop_after=stop_at)
        return tiny.digest(load_file(done.artifact / "adapter_model.safetensors"))

    def checkpoints(self, folder: Path) -> list[Path]:
        return manifest.newest_first(StageDir(folder / "01-sft").checkpoints)[::-1]

    def weights(self, checkpoint: Path) -> Path:
        return checkpoint / "rank0.safetensors"

    optimizer = weights

    def recipe(self, folder: Path, *, processes: int = 1, steps: int = tiny.STEPS) -> Path:
        path = folder / "tiny.toml"
        strategy = "ddp" if processes > 1 else "single"
        filled = {"model": self._model, "rows": self._rows, "strategy": strategy}
        path.write_text(RECIPE.format(**filled, processes=processes, steps=steps))
        return path


def start(*arguments: str | Path, **environment: str) -> subprocess.Popen[bytes]:
    """The command line, as a user has it."""
    command = [sys.executable, "-m", "ftlaunch", *map(str, arguments)]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment, **quiet)


def processes_of(run: RunDir) -> Iterator[tuple[int, list[bytes], dict[bytes, bytes]]]:
    """Pid, words and environment of every process that works in a run."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            pairs = (item.partition(b"=") for item in (folder / "environ").read_bytes().split(b"\0"))
            variables = {name: value for name, _, value in pairs}
        except OSError:
            continue
        if variables.get(b"FTLAUNCH_ATTEMPT", b"").startswith(os.fsencode(run.path)):
            yield int(folder.name), words, variables


def pid_of_rank_1(run: RunDir, module: bytes) -> int:
    return next(
        pid for pid, words, variables in processes_of(run) if module in words and variables.get(b"RANK") == b"1"
    )


def latest(saver: OurSaver, work: Path) -> Verdict:
    """Rank 1's writing process is stopped, as by a disk that hangs; then every process is killed."""
    run = RunDir(work / "run")
    driver = start("run", saver.recipe(work, processes=2, steps=4000), "--run-dir", run.path)
    folder = run.path / "01-sft/checkpoints"
    assert wait(lambda: bool(manifest.newest_first(folder)), 120), driver.communicate()[0]
    os.kill(pid_of_rank_1(run, b"fttrain.checkpoint.writer"), signal.SIGSTOP)
    time.sleep(SETTLE)
    driver.kill()
    for pid, *_ in list(processes_of(run)):
        os.kill(pid, signal.SIGKILL)
    driver.communicate()
    named = manifest.newest_first(folder)[0]
    partial = sorted(path.name for path in folder.glob(".*"))
    problem = manifest.verify(named)
    if problem:
        return Verdict("FAIL", f"{named.name}: {problem}")
    return Verdict("pass", f"the newest that has its name is whole{'; the torn one never got one' if partial else ''}")


def hang(saver: OurSaver, work: Path) -> Verdict:
    run = RunDir(work / "run")
    driver = start("run", saver.recipe(work, processes=2, steps=4000), "--run-dir", run.path)
    stage_dir = run.stage_dir("01-sft")
    assert wait(lambda: stage_dir.metrics.exists() and stage_dir.metrics.stat().st_size > 0, 120), driver.communicate()[
        0
    ]
    stopped = pid_of_rank_1(run, b"fttrain")
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    seen = wait(lambda: driver.poll() is not None or stage_dir.all_attempts()[-1].error.exists(), SEEN_WITHIN)
    took = time.monotonic() - began
    subprocess.run([sys.executable, "-m", "ftlaunch", "cancel", str(run.path)], check=False, capture_output=True)
    driver.communicate()
    return Verdict("pass", f"after {took:.0f} s") if seen else Verdict("FAIL", "not noticed")


PROFILE_KEYS = ("partition", "account", "qos", "constraint", "sbatch.comment")


def newline(saver: OurSaver, work: Path) -> Verdict:
    """Every text of a site profile, and the run's name and folder, with a command after a line break."""
    if importlib.util.find_spec("ftlaunch.backend.slurm.submit") is None:
        return Verdict("not built yet", "there is no SLURM backend")
    canary = "touch CANARY #"
    recipe, profile = saver.recipe(work), work / "site.toml"
    calls = [(f'{key} = "a\\n{canary}"\n', []) for key in PROFILE_KEYS]
    calls += [("", ["--set", f"name=a\n{canary}"]), ("", ["--run-dir", f"{work}/a\n{canary}"])]
    passed = []
    for text, arguments in [("", []), *calls]:
        profile.write_text(f'gpus = "none"\n{text}')
        told = start("plan", recipe, "--cluster", profile, *arguments)
        out = told.communicate()[0].decode()
        if told.returncode == 0 and any(line.startswith("touch CANARY") for line in out.splitlines()):
            return Verdict("FAIL", f"{text or arguments} is a line of the script")
        passed.append(told.returncode)
    assert passed[0] == 0, "a plain profile is planned"
    return Verdict("pass", f"{passed.count(2)} of {len(calls)} such values refused, none a line of the script")


def secret(saver: OurSaver, work: Path) -> Verdict:
    """Every process prints its environment, past Python's streams too."""
    run = RunDir(work / "run")
    notes = str(work / "notes")
    printing = {"PYTHONPATH": str(SECRET_PRINTING), "PRINTING_NOTES": notes, "LAB_SECRET": CANARY[::-1]}
    driver = start("run", saver.recipe(work), "--run-dir", run.path, HF_TOKEN=CANARY, **printing)
    lines = set()
    while driver.poll() is None:
        lines |= {b" ".join(words) for _, words, _ in processes_of(run)}
        time.sleep(0.05)
    said = driver.communicate()[0]
    assert driver.returncode == 0, said.decode()
    contents = {path.name: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert any(b"[secret]" in content for content in contents.values()), "nothing was leaked"
    places = [name for name, content in contents.items() if CANARY.encode() in content]
    if places or any(CANARY.encode() in line for line in [*lines, said]):
        return Verdict("FAIL", f"found in {', '.join(places) or 'a command line or the output'}")
    return Verdict("pass", f"in none of {len(contents)} files, the output and {len(lines)} command lines")
