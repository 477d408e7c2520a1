"""Whole chains of stages on two processes, here and on the devcluster, killed once in every stage: `make chains`.

SFT → DPO → merge and SFT → reward → PPO → merge each run four times: calm and killed, on this machine and as SLURM jobs
on two nodes. Here a killed run is resumed, on the devcluster it goes on by itself. Everything that is handed on, the
merged model included, is compared byte by byte with that of the calm run.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import save_tiny_model, write_rows
from tests.faults.cluster_faults import DEVCLUSTER
from tests.faults.storm import PROFILE
from tests.trainer.conftest import make_pairs

from ftlaunch import processes
from ftlaunch.backend import backends
from ftlaunch.backend.status import newest_checkpoint
from ftlaunch.run.layout import RunDir, StageDir
from ftlaunch.watch.status import read_status

PATIENCE_SECONDS = 300.0
POLL_SECONDS = 0.1
HEAD = """\
name = "{name}"
seed = 5
deterministic = true
model = {{ path = "./model", dtype = "fp32" }}
adapter = {{ kind = "lora", dropout = 0.1 }}
[data.rows]
path = "rows.jsonl"
prompt = "{{question}}"
completion = "{{answer}}"
[data.pairs]
path = "pairs.jsonl"
format = "preference"
[parallel]
strategy = "{strategy}"
device = "cpu"
"""
LEARNING = "steps = 12\nbatch_size = 8\nsave_every = 3\nlearning_rate = 1e-2\n"
PPO = """\
rollout_size = 16
ppo_epochs = 2
max_new_tokens = 4
score_scaling = "running"
kl_target = 1.0
[data.prompts]
path = "rows.jsonl"
prompt = "{question}"
"""
STAGES = {
    "sft": f'data = "rows"\n{LEARNING}',
    "dpo": f'data = "pairs"\n{LEARNING}',
    "reward": f'data = "pairs"\n{LEARNING}',
    "ppo": f'data = "prompts"\n{LEARNING}{PPO}',
    "merge": "",
}
CHAINS = {"sft dpo merge": "zero2", "sft reward ppo merge": "ddp"}
PLACES = {"here": ["--procs-per-node", "2"], "on the devcluster": ["--nodes", "2", "--cluster", "site.toml"]}


def main() -> int:
    """Print how each chain ended; 1 where a killed one differs from the calm one."""
    subprocess.run([sys.executable, str(DEVCLUSTER), "up", "--nodes", "3"], check=True, stdout=subprocess.DEVNULL)
    folder = Path(tempfile.mkdtemp(prefix="ftlaunch-chains-"))
    save_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_pairs()))
    (folder / "site.toml").write_text(PROFILE)
    wrong = 0
    for number, (chain, strategy) in enumerate(CHAINS.items()):
        for place, options in PLACES.items():
            calm = _run(folder, f"calm{number}-{place[:2]}", chain, strategy, options)
            _wait(lambda calm=calm: backends.of(calm).is_over(calm))
            killed = _run(folder, f"killed{number}-{place[:2]}", chain, strategy, options)
            told = [_kill(killed, stage_dir, resumed=place == "here") for stage_dir in killed.stage_dirs()]
            _wait(lambda killed=killed: backends.of(killed).is_over(killed))
            same = read_status(killed).state == "done" and _handed_on(killed) == _handed_on(calm) != {}
            wrong += not same
            print(
                f"{chain}, {strategy}, {place}: killed {', '.join(told)}: {'equal' if same else 'NOT equal'}",
                flush=True,
            )
    if not wrong:
        shutil.rmtree(folder)
    return 1 if wrong else 0


def _run(folder: Path, name: str, chain: str, strategy: str, options: list[str]) -> RunDir:
    """A run of a chain, started as a user does it, in the background."""
    stages = "".join(f'[[stage]]\nkind = "{kind}"\n{STAGES[kind]}' for kind in chain.split())
    recipe = folder / f"{name}.toml"
    recipe.write_text(HEAD.format(name=name, strategy=strategy) + stages)
    detached = [] if "--cluster" in options else ["--detach"]
    _ftlaunch(folder, "run", recipe.name, "--run-dir", name, *options, *detached)
    return RunDir(folder / name)


def _ftlaunch(folder: Path, *words: str) -> None:
    variables = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "ftlaunch", *words], cwd=folder, env=variables, capture_output=True, check=True
    )


def _kill(run: RunDir, stage_dir: StageDir, *, resumed: bool) -> str:
    """SIGKILL a rank of a stage, once it has saved where it saves, and see that the run goes on; what was killed."""
    merges = stage_dir.name.endswith("merge")
    ranks: dict[int, int] = {}

    def is_due() -> bool:
        ranks.update(
            processes.ranks_of(stage_dir.all_attempts()[-1].path, range(1 if merges else 2))
            if stage_dir.all_attempts()
            else {}
        )
        return bool(ranks) and (merges or newest_checkpoint(stage_dir) is not None)

    _wait(is_due)
    victim = max(ranks)
    os.kill(ranks[victim], signal.SIGKILL)
    assert not stage_dir.result.exists(), f"{stage_dir.name} has ended before it could be killed"
    if resumed:
        _wait(lambda: backends.of(run).is_over(run))
        _ftlaunch(run.path.parent, "resume", str(run.path), "--detach")
    _wait(lambda: len(stage_dir.all_attempts()) > 1 or stage_dir.result.exists())
    return f"rank {victim} of {stage_dir.name}"


def _wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not until():
        assert time.monotonic() < deadline, f"nothing has happened for {PATIENCE_SECONDS:g} s"
        time.sleep(POLL_SECONDS)


def _handed_on(run: RunDir) -> dict[str, bytes]:
    """Weights of artifacts and of the merged model, by place."""
    files = [
        path
        for stage_dir in run.stage_dirs()
        for folder in (stage_dir.artifact, stage_dir.model)
        for path in folder.glob("*.safetensors")
    ]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in files}


if __name__ == "__main__":
    sys.exit(main())
