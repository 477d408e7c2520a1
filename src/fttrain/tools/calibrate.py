"""`ftlaunch plan --calibrate`, as `python -m fttrain.tools.calibrate`: how fast this machine multiplies matrices."""

import json
import platform
import sys
import time
from collections.abc import Iterator

import torch

from ftlaunch.tools import ToolOptions
from fttrain.distributed import precision
from fttrain.tools.output import answer

SIDE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices."""
SECONDS = 0.5
"""Seconds for which each format is tried."""


def main(_: ToolOptions) -> Iterator[str]:
    """Yield the measures of the best device here as JSON."""
    yield json.dumps(measure(torch.device("cuda" if torch.cuda.is_available() else "cpu")))


def measure(device: torch.device) -> dict[str, object]:
    """The machine, its device, and operations a second in fp32 and in the format that "auto" chooses there."""
    formats = {"fp32": torch.float32}
    native = precision.native(device).dtype
    if native != "fp32":
        formats[native] = {"bf16": torch.bfloat16, "fp16": torch.float16}[native]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    found = {word: _speed(dtype, device) for word, dtype in formats.items()}
    return {"machine": platform.node(), "device": name, "operations_per_second": found}


def _speed(dtype: torch.dtype, device: torch.device) -> float:
    side = SIDE[device.type]
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    # Once without the clock: the first product chooses a kernel and touches its memory.
    torch.mm(left, right)
    _wait(device)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        torch.mm(left, right)
        _wait(device)
        count += 1
    # A product of two n × n matrices takes n³ multiplications and as many additions.
    return count * 2 * side**3 / (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    """Wait until the device is done with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(answer(main, ToolOptions()))
