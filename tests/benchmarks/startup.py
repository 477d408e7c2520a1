"""How long a person waits: for `--help`, and from the command to the first optimizer step.

    python tests/benchmarks/startup.py --model .cache/SmolLM2-135M-Instruct

The opponents, started in turn with ours: `trl --help` and `accelerate launch --help` (TRL is in the extra `dev`), and
plain_sft.py, a hand-written accelerate script that does the same first step. Medians; files are warm. Each run
tokenizes its rows again. The last line is the smallest ratio of `--help`, theirs over ours.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duel

HERE = Path(__file__).parent
ROWS = HERE.parents[1] / "recipes" / "data" / "restaurants.jsonl"
BIN = Path(sys.executable).parent
RECIPE = """
name = "first"
[model]
path = "{model}"
dtype = "{dtype}"
[adapter]
kind = "lora"
[data.rows]
path = "{rows}"
prompt = "{{mr}}"
completion = "{{text}}"
[[stage]]
kind = "sft"
data = "rows"
steps = 1
[parallel]
device = "cpu"
"""


def seconds(command: list[str | Path]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def help_times(rounds: int) -> dict[str, float]:
    commands = {
        "ftlaunch --help": [BIN / "ftlaunch", "--help"],
        "trl --help": [BIN / "trl", "--help"],
        "accelerate launch --help": [BIN / "accelerate", "launch", "--help"],
    }
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds + 1):
        for name, command in commands.items():
            found[name].append(seconds(command))
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def ours(model: str, dtype: str) -> float:
    """Seconds from `ftlaunch run` to the first line of metrics.jsonl, with an empty token cache."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "first.toml"
        recipe.write_text(RECIPE.format(model=Path(model).absolute(), dtype=dtype, rows=ROWS))
        env = os.environ | {"XDG_CACHE_HOME": folder}
        metrics = Path(folder) / "run" / "01-sft" / "metrics.jsonl"
        started = time.perf_counter()
        run = subprocess.Popen(
            [BIN / "ftlaunch", "run", recipe, "--run-dir", Path(folder) / "run"], env=env, stderr=subprocess.PIPE
        )
        while not metrics.exists():
            time.sleep(0.01)
            assert run.poll() in (None, 0), run.communicate()[1].decode()
        waited = time.perf_counter() - started
        run.communicate()
        return waited


def theirs(model: str, dtype: str) -> float:
    """Seconds from `accelerate launch` to the hand-written script's first step, with an empty datasets cache."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"HF_DATASETS_CACHE": folder}
        launch = [BIN / "accelerate", "launch", "--num_processes", "1", "--cpu"]
        command = [*launch, HERE / "plain_sft.py", model, ROWS, dtype]
        started = time.perf_counter()
        run = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("FIRST STEP"):
                break
        else:
            raise SystemExit("the hand-written script failed")
        waited = time.perf_counter() - started
        run.communicate()
        return waited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    duel.add_dtype(parser)
    options = parser.parse_args()
    times = help_times(options.rounds)
    for name, value in times.items():
        print(f"{name:26s} {value:7.3f} s")
    dtype = duel.dtype_of(options)
    first = {"ours": [], "by hand": []}
    for _ in range(max(2, options.rounds // 2)):
        first["ours"].append(ours(options.model, dtype))
        first["by hand"].append(theirs(options.model, dtype))
    for name, values in first.items():
        print(f"first step, {name:8s}       {statistics.median(values):7.2f} s")
    mine, trl, accelerate = times.values()
    print(f"trl --help / ftlaunch --help: {trl / mine:.1f}; accelerate launch --help / ours: {accelerate / mine:.1f}")
    print(f"ratio {min(trl, accelerate) / mine:.2f}")


if __name__ == "__main__":
    main()
