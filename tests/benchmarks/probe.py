"""What the probe at the start of a stage costs: CPU seconds, their share of the start, and passes by arithmetic.

    PYTHONPATH=. python tests/benchmarks/probe.py --model .cache/SmolLM2-135M-Instruct

Measured on a CPU in fp32. For larger models: 2 floating-point operations per weight and token at an H100's published
peak, and the time to read all weights once per pass from its memory.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from tests.conftest import write_rows
from tests.trainer.in_process import ALONE, make_data, make_step, start_afresh

from ftlaunch.plan.cost import devices, shape
from ftlaunch.run.layout import StageDir
from fttrain import artifact
from fttrain.data.batches import Layout
from fttrain.model.scorer import Scorer
from fttrain.training import probe, session

LARGE = ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B")
BANDWIDTH = 3.35e12
"""Bytes per second of an H100 SXM's memory, as published."""
BYTES = 2
"""Of a weight in bf16."""


def by_arithmetic(name: str, passes: int, tokens: int) -> tuple[float, float]:
    """Return the seconds that a model's passes take at an H100's peak, and those that reading its weights takes."""
    found, card = shape.read(name), devices.known_gpu("NVIDIA H100 80GB HBM3")
    assert found is not None
    assert card is not None
    _, teraflops = card
    compute = 2 * found.parameters * tokens / (teraflops * 1e12)
    return compute, passes * found.parameters * BYTES / BANDWIDTH


def measured(model: Path, folder: Path) -> dict[str, float]:
    """Return CPU seconds of a stage's start and of the probe in it, with the passes and tokens of the probe."""
    spec = make_step(model, make_data(write_rows(folder / "rows.jsonl")), steps=1)
    start_afresh()
    began = time.process_time()
    origin = artifact.origin(spec, StageDir(folder / "01-sft"))
    assert spec.stage is not None
    engine = session.build(spec, spec.stage, ALONE, origin, lambda model, _: Scorer(model))
    start = time.process_time() - began
    began = time.process_time()
    verdict = probe.settle(engine, Layout(packing=True), "fp32", [], begins_as_base=True)
    alone = time.process_time() - began
    return {"start_cpu_s": start, "probe_cpu_s": alone, "passes": verdict.passes, "tokens": verdict.tokens}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    imports = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        told = measured(parser.parse_args().model, Path(scratch))
    told["share_of_start"] = told["probe_cpu_s"] / (told["start_cpu_s"] + imports)
    print(json.dumps(told, indent=2))
    for name in LARGE:
        compute, reading = by_arithmetic(name, int(told["passes"]), int(told["tokens"]))
        print(f"{name}: {1e3 * compute:.1f} ms of arithmetic, {1e3 * reading:.0f} ms to read the weights")
