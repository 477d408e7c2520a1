"""What PPO holds next to its policy: value head, reward model, and what its rollouts take."""

from pathlib import Path

from ftlaunch.plan.cost import shape as shapes
from ftlaunch.plan.cost.activations import FLOAT
from ftlaunch.plan.cost.shape import Shape
from ftlaunch.recipe import Ppo
from ftlaunch.recipe.names import holds
from ftlaunch.run.spec import StageSpec
from ftlaunch.safety.model_files import ADAPTER_WEIGHTS

DRAWN = FLOAT + FLOAT + 8 + 8
"""Bytes of a logit in sampling: in fp32, as log-probability, and as probability and its running sum in fp64."""


def reward_model(spec: StageSpec, stage: Ppo, shape: Shape, size: int, adapter: int) -> int:
    """Bytes of the model that gives the scores; 0 where a function does, or where its sizes are not known here.

    `adapter` is what the policy's adapter takes: that of an earlier reward stage is taken for one like it.
    """
    if spec.reward is not None:
        return adapter or size * shape.parameters
    if stage.reward_model is None:
        return 0
    if holds(stage.reward_model, ADAPTER_WEIGHTS):
        return (Path(stage.reward_model) / ADAPTER_WEIGHTS).stat().st_size
    found = shapes.read(stage.reward_model)
    return 0 if found is None else size * found.parameters


def unknown_reward_model(spec: StageSpec) -> str | None:
    """The model that gives the scores, where nothing here tells its sizes."""
    place = spec.stage.reward_model if isinstance(spec.stage, Ppo) and spec.reward is None else None
    if place is None or holds(place, ADAPTER_WEIGHTS) or shapes.read(place) is not None:
        return None
    return place


def rollout(spec: StageSpec, stage: Ppo, shape: Shape, size: int) -> tuple[int, int]:
    """Bytes of keys and values, and of the rest, of answers that one process generates side by side.

    The rest is the larger of two: the widest layer's work on the prompts, or the logits of one token each. A cache
    grows by joining: the layer at work holds its keys and values twice.
    """
    if stage.rollout_engine == "vllm":
        return 0, 0
    longest = max(data.max_length for data in spec.data.values())
    answers = min(stage.generation_batch_size, -(-(stage.rollout_size or stage.batch_size) // spec.world_size))
    cache = shapes.cache_bytes(shape, answers, longest + stage.max_new_tokens, size)
    at_work = size * (3 * shape.mlp + shape.width) + FLOAT * shape.width
    return cache, max(answers * longest * at_work, answers * shape.vocabulary * DRAWN + cache // shape.layers)
