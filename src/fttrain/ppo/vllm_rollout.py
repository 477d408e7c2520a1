"""Rollouts by vLLM: on each rank's own GPU, in a process of its own, with the current adapter.

That process loads the base a second time, in the trainer's number format; before each rollout it gets the adapter as a
plain LoRA folder. Training uses the log-probabilities that the trainer itself computes for the answers, and a rollout
whose log-probabilities are too far from them is refused.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import LowRank
from ftlaunch.recipe.noise import Noise
from ftlaunch.recipe.stages import Ppo
from ftlaunch.run.spec import StageSpec
from fttrain import adapters, artifact
from fttrain.distributed.world import World
from fttrain.engine import Engine
from fttrain.model.scorer import DTYPES
from fttrain.ppo.rollout import Response, Sampling

DEVICE = "cuda"
MEMORY = 0.3
"""Share of the GPU's memory for vLLM where the recipe names none."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank of an adapter."""
OF_A_RANK = ("TORCHELASTIC_", "ACCELERATE_", "GROUP_", "ROLE_", "LOCAL_", "MASTER_", "RANK", "WORLD_SIZE")
"""Environment variables by which vLLM would take itself for one of the ranks."""


def refuse_what_cannot_be(world: World, replaced: Sequence[Noise]) -> None:
    """Raise UserError where vLLM is not installed, this rank has no GPU, or activation functions were replaced.

    `replaced` are the [noise] tables that replaced them.
    """
    keep = 'or set rollout_engine = "torch"'
    if importlib.util.find_spec("vllm") is None:
        raise UserError('rollout_engine is "vllm", which is not installed', f"pip install vllm, {keep}")
    if world.device.type != DEVICE:
        raise UserError('rollout_engine is "vllm", and torch sees no GPU here', f"run it on a GPU, {keep}")
    if replaced:
        message = "vLLM would answer with the base's own activation function, which an earlier stage has replaced"
        raise UserError(message, 'set rollout_engine = "torch"')


class VllmRollout:
    """A `RollOut` that has vLLM answer as the policy."""

    def __init__(
        self, spec: StageSpec, engine: Engine, base: artifact.StartPoint, longest_prompt: int, folder: Path
    ) -> None:
        """`folder` is where the adapter is handed over; all nodes see it."""
        assert isinstance(spec.stage, Ppo)
        assert isinstance(spec.adapter, LowRank)
        self._step, self._stage, self._engine, self._folder = spec, spec.stage, engine, folder
        self._load = {
            "model": base.base.path,
            "revision": base.base.revision,
            "dtype": str(DTYPES[spec.model.dtype]).removeprefix("torch."),
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # the model's own would add end tokens, top-k and the like
            "logprobs_mode": "processed_logprobs",  # those of the temperature that is sampled with
            "max_model_len": longest_prompt + self._stage.max_new_tokens,
            "gpu_memory_utilization": self._stage.vllm_memory or MEMORY,
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": next(rank for rank in (*RANKS, spec.adapter.rank) if rank >= spec.adapter.rank),
        }
        self._number = 0
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, prompts: Sequence[np.ndarray], sampling: Sampling) -> list[Response]:
        world = self._engine.world
        self._number += 1
        policy = self._hand_over()
        rows = range(len(prompts))[world.rank :: world.size]
        seeds = [int(np.random.Generator(np.random.PCG64([*sampling.seed, row])).integers(1 << 31)) for row in rows]
        how = {
            "temperature": self._stage.temperature,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": sorted(sampling.stop_ids),
        }
        ids = [prompts[row].tolist() for row in rows]
        order = {"adapter": str(policy), "number": self._number, "prompts": ids, "seeds": seeds, "sampling": how}
        said = self._ask(order) if ids else []  # of fewer prompts than ranks some have none
        answers = [
            Response(np.array(i, dtype=np.int32), np.array(p, dtype=np.float32), bool(end)) for i, p, end in said
        ]
        return world.collect(dict(zip(rows, answers, strict=True)), len(prompts))

    def _hand_over(self) -> Path:
        """Return the folder of the current adapter, which rank 0 writes. Collective."""
        weights = artifact.trained_weights(self._engine)
        policy = self._folder / str(self._number)  # a new name each time, as vLLM caches adapters
        if self._engine.world.is_main:
            shutil.rmtree(self._folder, ignore_errors=True)
            adapters.save(self._engine.scorer.model, self._step.adapter, weights, policy)
        self._engine.world.barrier()
        return policy

    def _ask(self, order: dict[str, Any]) -> list[tuple[list[int], list[float], bool]]:
        self._process = process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the empty line below says that it has ended
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        if not (line := process.stdout.readline()):
            raise RuntimeError(f"vLLM has ended (exit code {process.wait()}); this rank's log has its last words")
        return json.loads(line)

    def _start(self) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OF_A_RANK)}
        own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fttrain.ppo.vllm_engine", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=kept | own | {"CUDA_VISIBLE_DEVICES": _gpu(self._engine.world)},
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(self._load) + "\n")
        return process


def _gpu(world: World) -> str:
    """Return the rank's GPU in the numbering of CUDA_VISIBLE_DEVICES, for another process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = world.device.index or 0
    return visible.split(",")[number] if visible else str(number)
