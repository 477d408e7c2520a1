"""Proximal policy optimization: answers are sampled, scored, and trained on for a few steps, again and again."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftlaunch.recipe import Full, Ppo
from ftlaunch.rundir import Step, StepDir
from fttrain import adapters, artifact, optim
from fttrain.actor import REFERENCE, Acted, Actor
from fttrain.checkpoint.store import Checkpoints
from fttrain.data.batches import Micro
from fttrain.data.feed import Feed
from fttrain.data.prompts import load_prompts
from fttrain.engine import Engine
from fttrain.experience import PpoMicro
from fttrain.leave import StopRequest
from fttrain.loop import Habits, fit
from fttrain.metrics import MetricsLog
from fttrain.model import DTYPES, load_base, load_tokenizer
from fttrain.objectives import ppo
from fttrain.optim import Schedule
from fttrain.practice import Practice
from fttrain.progress import Progress
from fttrain.rewards import FunctionReward
from fttrain.world import World

SUMS = ("tokens", "policy_loss", "value_loss", "entropy", "clip_fraction", "value_clip_fraction", "policy_change")


class Clipped:
    """Clipped policy and value losses of a mini-batch's tokens, less their entropy."""

    def __init__(self, stage: Ppo, practice: Practice) -> None:
        self._stage = stage
        self._practice = practice
        self._sums = [0.0] * len(SUMS)

    def weight(self, micro: Micro) -> float:
        return float(micro.targets_N.numel())

    def loss(self, engine: Engine, micro: Micro) -> Tensor:
        assert isinstance(micro, PpoMicro)
        acted: Acted = engine.forward(micro)
        policy = ppo.policy_loss(acted.logps_N, micro.old_logps_N, micro.advantages_N, clip=self._stage.clip)
        value = ppo.value_loss(acted.values_N, micro.old_values_N, micro.returns_N, clip=self._stage.value_clip)
        change_N = ppo.token_kl(micro.old_logps_N, acted.logps_N.detach(), estimator="k3")
        columns = (policy.losses_N, value.losses_N, acted.entropy_N, policy.clipped_N, value.clipped_N, change_N)
        sums = [float(micro.targets_N.numel()), *(float(column.detach().sum()) for column in columns)]
        self._sums = [total + part for total, part in zip(self._sums, sums, strict=True)]
        loss = policy.losses_N.sum() + self._stage.value_weight * value.losses_N.sum()
        return loss - self._stage.entropy_weight * acted.entropy_N.sum()

    def measures(self, engine: Engine) -> dict[str, float]:
        """Means over the tokens of the step's mini-batch, and those of its rollout."""
        tokens, *sums = engine.world.sum(self._sums)
        self._sums = [0.0] * len(SUMS)
        assert self._practice.experience is not None
        means = {name: total / tokens for name, total in zip(SUMS[1:], sums, strict=True)}
        return {**means, **self._practice.experience.measures()}

    def evaluate(self, engine: Engine, feed: Feed) -> dict[str, float]:  # noqa: ARG002 the protocol's
        return self._practice.evaluate()


def run(step: Step, folder: StepDir, world: World, stop: StopRequest) -> dict[str, Any]:
    """Train the stage to its end, from its newest good checkpoint if there is one, and leave the policy's artifact."""
    stage = step.stage
    assert isinstance(stage, Ppo)
    origin = artifact.origin(step, folder)
    tokenizer = load_tokenizer(origin.tokenizer, origin.base.revision)
    prompts = load_prompts(list(step.data.values()), tokenizer, step.seed)
    assert stage.reward_function is not None
    reward = FunctionReward(stage.reward_function)
    engine, actor = _build(step, stage, world, origin)
    practice = Practice(step, stage, prompts, tokenizer, engine, actor, reward)
    checkpoints = Checkpoints(folder.checkpoints, step, engine, practice)
    loaded = checkpoints.load()
    progress = Progress(**loaded.state) if loaded else Progress()
    metrics = MetricsLog(folder.metrics, is_main=world.is_main, last_step=progress.step)
    practice.samples = MetricsLog(folder.samples, is_main=world.is_main, last_step=progress.step)
    fit(
        Clipped(stage, practice),
        engine,
        practice,
        Schedule(stage, peak=step.learning_rate, num_steps=practice.num_steps),
        checkpoints,
        metrics,
        stop,
        Habits(stage.evaluate_every, stage.save_every, stage.keep, stage.on_nonfinite),
        progress,
    )
    artifact.save(step, origin, engine, tokenizer, folder.artifact)
    return {"steps": progress.step, "tokens": progress.tokens, "artifact": Path(folder.artifact).name}


def _build(step: Step, stage: Ppo, world: World, origin: artifact.Origin) -> tuple[Engine, Actor]:
    """The engine with policy, value head and reference in it; all ranks start from the same weights."""
    torch.manual_seed(step.seed)
    engine = Engine(step, world)
    dtype = DTYPES[step.model.dtype]
    is_full = isinstance(step.adapter, Full)
    held_in = torch.float32 if is_full and not engine.zero_stage else dtype
    base = load_base(origin.base, dtype=held_in, packing=stage.packing)
    if stage.activation_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    policy = adapters.attach(base, step.adapter, origin.adapter, in_fp32=not engine.zero_stage)
    if origin.adapter is not None:
        adapters.add_frozen(policy, origin.adapter, REFERENCE, in_fp32=not engine.zero_stage)
    frozen = _frozen(origin, dtype, stage) if is_full else None
    actor = Actor(policy, frozen, temperature=stage.temperature).train()
    engine.prepare(actor, optim.build(step.optimizer, actor.named_parameters()))
    return engine, actor


def _frozen(origin: artifact.Origin, dtype: torch.dtype, stage: Ppo) -> nn.Module:
    """The whole model once more, as it is now."""
    return load_base(origin.base, dtype=dtype, packing=stage.packing).requires_grad_(False).eval()
