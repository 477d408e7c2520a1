"""Supervised fine-tuning: cross-entropy of the trained tokens."""

from typing import Any

from torch import Tensor

from ftlaunch.recipe import Sft
from ftlaunch.rundir import Step, StepDir
from fttrain.data import feed as feeds
from fttrain.data.batches import Micro
from fttrain.data.feed import Feed
from fttrain.engine import Engine
from fttrain.leave import StopRequest
from fttrain.model import Scorer
from fttrain.training import train
from fttrain.world import World


class CrossEntropy:
    """Sum of the trained tokens' cross-entropies, smoothed as the recipe says."""

    def weight(self, micro: Micro) -> float:
        return float(micro.targets_N.numel())

    def loss(self, engine: Engine, micro: Micro) -> Tensor:
        return -engine.scores(micro).smoothed_N.sum()

    def measures(self, engine: Engine) -> dict[str, float]:  # noqa: ARG002 the protocol's
        return {}

    def evaluate(self, engine: Engine, feed: Feed) -> dict[str, float]:
        """Loss, perplexity and accuracy over all trained tokens of the rows held out, weighted by token."""
        sums = [0.0, 0.0, 0.0]
        with engine.evaluating():
            for micro in feed.evaluation():
                scores = engine.scores(micro)
                parts = (-scores.logps_N.sum(), scores.correct_N.sum(), micro.targets_N.numel())
                sums = [total + float(part) for total, part in zip(sums, parts, strict=True)]
        nll, correct, count = engine.world.sum(sums)
        if not count:
            return {}
        loss = nll / count
        perplexity = feeds.mean_perplexity(loss)
        return {"eval/loss": loss, "eval/perplexity": perplexity, "eval/token_accuracy": correct / count}


def run(step: Step, folder: StepDir, world: World, stop: StopRequest) -> dict[str, Any]:
    """Train the stage; returns how far it came."""
    stage = step.stage
    assert isinstance(stage, Sft)
    return train(
        step,
        folder,
        world,
        stop,
        lambda model, _: Scorer(model, smoothing=stage.label_smoothing, neftune_alpha=stage.neftune_alpha),
        lambda *_: CrossEntropy(),
    )
