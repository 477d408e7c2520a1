"""The models that give PPO its scores."""

from pathlib import Path

from ftlaunch.plan.cost import shape as shapes
from ftlaunch.plan.cost.shape import Shape
from ftlaunch.recipe.names import holds
from ftlaunch.recipe.stages import Ppo
from ftlaunch.run.spec import StageSpec
from ftlaunch.safety.model_files import ADAPTER_WEIGHTS


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
