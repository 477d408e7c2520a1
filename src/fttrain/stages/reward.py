"""The reward model: a scalar head, trained to give the better answer the larger number."""

import torch
from safetensors.torch import load_file
from torch import nn

from ftlaunch.recipe.stages import Reward
from ftlaunch.run.layout import StageDir
from ftlaunch.run.records import TrainingResult
from ftlaunch.run.spec import StageSpec
from fttrain.artifact import StartPoint
from fttrain.data.batches import MicroBatch
from fttrain.distributed.stop_request import StopRequest
from fttrain.distributed.world import World
from fttrain.engine import Engine
from fttrain.model.scorer import RewardModel
from fttrain.objectives.preference import bradley_terry
from fttrain.preference.objective import Compared, Comparison
from fttrain.training.session import train


def run(spec: StageSpec, folder: StageDir, world: World, stop: StopRequest) -> TrainingResult:
    """Train the stage; return the content of result.json."""
    stage = spec.stage
    assert isinstance(stage, Reward)

    def compare(engine: Engine, micro: MicroBatch) -> Compared:
        # A micro-batch lists each pair's chosen row and then its rejected one.
        rewards_G2 = engine.forward(micro).view(-1, 2)
        losses_G = bradley_terry(rewards_G2, micro.margins_G, margin=stage.margin, centering=stage.centering)
        return Compared(losses_G, rewards_G2.detach())

    return train(spec, folder, world, stop, _rewarder, lambda *_: Comparison(compare))


def _rewarder(model: nn.Module, origin: StartPoint) -> RewardModel:
    """Return a reward model, with the previous stage's head if that was a reward model, too."""
    rewarder = RewardModel(model)
    if origin.head is not None:
        # Copied in place, so that the head keeps the format and the device that it was made with.
        with torch.no_grad():
            rewarder.score.weight.copy_(load_file(origin.head)["score.weight"])
    return rewarder
