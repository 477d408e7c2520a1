"""The time that a calibrated plan tells against the time that training takes, as a ratio, in seconds of the CPU.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/calibrated.py --model .cache/SmolLM2-135M-Instruct

Each stage is trained for a few steps and for more; what the latter took longer is the time of the steps between,
without any start. All rows are as long as may be. The speed of matrix products is measured before each stage and after
it, in seconds of the CPU as well, so that a busy machine changes little; with one thread they are those of a clock.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.estimates import Combination, make_models, write_run

FEW, MORE = 2, 8
"""Optimizer steps."""
STAGES = [
    Combination("sft", "lora", "single", 2, 256),
    Combination("sft", "full", "single", 2, 256),
    Combination("dpo", "lora", "single", 2, 256),
    Combination("sft", "lora", "single", 1, 256, "smol"),
]
SPEED = """
import time, torch
from fttrain.tools import calibrate
torch.set_num_threads(1)
time.perf_counter = time.process_time
print(calibrate._speed(torch.float32, torch.device("cpu")))
"""


def speed() -> float:
    """Operations a second of the CPU in one thread, in fp32."""
    return float(subprocess.run([sys.executable, "-c", SPEED], capture_output=True, text=True, check=True).stdout)


def seconds(one: Combination, steps: int, models: dict[str, Path], folder: Path) -> float:
    """Train so many steps, and return what that took of the CPU."""
    folder.mkdir(parents=True)
    more = f"{one.more} stage.0.steps={steps} stage.0.save_every={steps}".strip()
    ((step, _),) = write_run(one._replace(more=more), models, folder)
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [
        "taskset",
        "-c",
        "0",
        sys.executable,
        "-m",
        "fttrain",
        str(step),
    ]  # one core, so that torch takes one thread
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, step
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    options = parser.parse_args()
    from ftlaunch.plan.cost import costs
    from ftlaunch.plan.cost.devices import Device

    folder = Path(tempfile.mkdtemp(prefix="calibrated-"))
    models = make_models(folder, options.model.resolve())
    for number, one in enumerate(STAGES):
        before = speed()
        few, more = (seconds(one, steps, models, folder / f"{number}-{steps}") for steps in (FEW, MORE))
        measured = (more - few) / (MORE - FEW)
        rate = (before + speed()) / 2
        (folder / str(number)).mkdir()
        ((_, spec),) = write_run(one, models, folder / str(number))
        told = costs.of_spec(spec, Device("the CPU", False), 4, rate)
        assert isinstance(told, costs.Cost)
        assert told.time is not None
        result = {"told": round(told.time.step, 3), "measured": round(measured, 3)}
        print(f"{one!s:48s} {json.dumps(result)}  ratio {told.time.step / measured:.2f}", flush=True)


if __name__ == "__main__":
    main()
