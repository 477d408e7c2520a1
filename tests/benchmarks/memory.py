"""Peak memory of a DPO and of a PPO stage with LoRA, against the sum of what must be in it: one copy of the base.

    PYTHONPATH=. python tests/benchmarks/memory.py --model .cache/SmolLM2-135M-Instruct --data ../shared/data

The parts: what the process holds before it has read a model, one base, the adapters with gradients and moments, one
chunk of logits, and the most that forward passes kept for backward ones, counted as autograd keeps it. A second base
would be one part too many.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

GIB = 1 << 30
MOMENTS = 2
LOGIT_BYTES = {"dpo": 3, "ppo": 24}
"""Of each logit of a chunk at most, as torch's profiler counts them: in bf16, and an eighth of them in fp32 with their
gradient. The entropy that PPO asks for takes all in fp32, with probabilities, products and gradients."""
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Has the C library give back what is freed, which it would keep to save time, and which would count as used. Hidden
states take about 3 MB; with a threshold above them a third of the peak is holes between them."""


class Kept:
    """Counts the bytes that autograd holds on to; what belongs to parameters is not counted."""

    def __init__(self) -> None:
        self.most = self._now = 0
        self._users: dict[int, int] = {}
        self.parameters: set[int] = set()

    def pack(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if (place := storage.data_ptr()) in self.parameters:
            return tensor
        self._users[place] = self._users.get(place, 0) + 1
        self._now += storage.nbytes() if self._users[place] == 1 else 0
        self.most = max(self.most, self._now)
        return tensor

    def unpack(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if users := self._users.pop(storage.data_ptr(), 0):
            self._now -= storage.nbytes() if users == 1 else 0
            self._users |= {storage.data_ptr(): users - 1} if users > 1 else {}
        return tensor


def write_run(kind: str, model: str, data: Path, folder: Path) -> Path:
    """A run folder with one stage over GSM8K's pairs or questions; returns the stage's folder."""
    from tests.faults.ranks import write_run

    from ftlaunch.recipe.adapter import Lora
    from ftlaunch.recipe.data import Data
    from ftlaunch.recipe.model import Model
    from ftlaunch.recipe.recipe import Recipe
    from ftlaunch.recipe.stages import Dpo, Parallel, Ppo

    pairs = (data / "gsm8k_pairs.jsonl").read_text().splitlines()[:64]
    (folder / "rows.jsonl").write_text("\n".join(pairs))
    (folder / "rewards.py").write_text("def length(prompt, answer, row):\n    return len(answer) / 100\n")
    path = str(folder / "rows.jsonl")
    ways: dict[str, tuple[Data, Any]] = {
        "dpo": (Data(path=path, format="preference"), Dpo(data="rows", steps=4, batch_size=8, micro_batch_size=8)),
        "ppo": (
            Data(path=path, format="prompt", prompt="{prompt}"),
            Ppo(
                data="rows",
                reward_function=f"{folder}/rewards.py:length",
                steps=4,
                rollout_size=32,
                batch_size=32,
                micro_batch_size=32,
                max_new_tokens=32,
            ),
        ),
    }
    table, stage = ways[kind]
    recipe = Recipe(
        name=kind,
        model=Model(path=model, dtype="bf16"),
        adapter=Lora(),
        data={"rows": table},
        stage=[stage],
        parallel=Parallel(device="cpu", strategy="single"),
    )
    return write_run(recipe, folder / "run").stage_dir(f"01-{kind}").path


def rank(kind: str, step: str) -> None:
    """Run the stage in this process and print its parts and its peak, in bytes."""
    import torch

    from fttrain import __main__ as trainer
    from fttrain.engine import Engine
    from fttrain.objectives.logps import CHUNK
    from fttrain.training import session

    parts: dict[str, int] = {}
    kept = Kept()
    prepare, load_base = Engine.prepare, session.load_base

    def noted(*arguments: Any, **named: Any) -> Any:
        parts["before a model is read"] = _peak()
        return load_base(*arguments, **named)

    def weighed(self: Engine, scorer: Any, optimizer: Any) -> None:
        prepare(self, scorer, optimizer)
        parts["base"] = sum(one.nbytes for one in scorer.parameters() if not one.requires_grad)
        trained = sum(one.nbytes for one in scorer.parameters() if one.requires_grad)
        parts["trained, with gradients and moments"] = trained * (2 + MOMENTS)
        parts["logits of a chunk"] = LOGIT_BYTES[kind] * CHUNK * scorer.model.config.vocab_size
        kept.parameters |= {one.untyped_storage().data_ptr() for one in scorer.parameters()}

    session.load_base, Engine.prepare = noted, weighed
    sys.argv = ["fttrain", step]
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        assert trainer.main() == 0
    parts["kept for the backward pass"] = kept.most
    print("PARTS " + json.dumps({"parts": parts, "peak": _peak()}))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def measure(kind: str, model: str, data: Path) -> float:
    """Print the parts of a stage and its peak; returns the peak over their sum."""
    with tempfile.TemporaryDirectory(prefix=f"memory-{kind}-") as folder:
        step = write_run(kind, model, data, Path(folder))
        environment = (
            os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])} | GIVE_BACK
        )
        command = [sys.executable, __file__, "--rank", kind, str(step)]
        done = subprocess.run(command, cwd=step.parent, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = next(line for line in done.stdout.splitlines() if line.startswith("PARTS "))
    told = json.loads(found.removeprefix("PARTS "))
    print(f"\n{kind}")
    for name, size in [*told["parts"].items(), ("sum", sum(told["parts"].values())), ("peak", told["peak"])]:
        print(f"  {name:36s} {size / GIB:6.3f} GiB")
    return told["peak"] / sum(told["parts"].values())


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        rank(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    ratios = {kind: measure(kind, str(Path(options.model).resolve()), options.data) for kind in ("dpo", "ppo")}
    print("\n" + ", ".join(f"{kind}: peak {ratio:.2f} of the sum" for kind, ratio in ratios.items()))


if __name__ == "__main__":
    main()
