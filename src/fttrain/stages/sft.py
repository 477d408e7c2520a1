"""Supervised fine-tuning: cross-entropy of the trained tokens."""

from typing import Any

from torch import Tensor

from ftlaunch.recipe import Sft
from ftlaunch.rundir import Step, StepDir
from fttrain.artifact import Origin
from fttrain.data import feed as feeds
from fttrain.data.batches import Micro
from fttrain.data.feed import Feed
from fttrain.engine import Engine
from fttrain.leave import StopRequest
from fttrain.model import Repeater, Scorer
from fttrain.noise import embeddings
from fttrain.objectives.consistency import Twice
from fttrain.training import train
from fttrain.world import World


class CrossEntropy:
    """Sum of the trained tokens' cross-entropies, smoothed as the recipe says."""

    def weight(self, micro: Micro) -> float:
        return float(micro.targets_N.numel())

    def loss(self, engine: Engine, micro: Micro) -> Tensor:
        return engine.scorer.disturbance.loss(lambda: -engine.scores(micro).smoothed_N.sum())

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


class Consistency(CrossEntropy):
    """R-Drop: cross-entropy under two draws of dropout and noise, and how far the two are apart."""

    def __init__(self) -> None:
        self._divergence = 0.0
        self._tokens = 0

    def loss(self, engine: Engine, micro: Micro) -> Tensor:
        twice: Twice = engine.forward(micro)
        self._divergence += float(twice.divergence_N.sum())
        self._tokens += micro.targets_N.numel()
        return twice.losses_N.sum()

    def measures(self, engine: Engine) -> dict[str, float]:
        """The divergence of the two passes over the step's tokens, in nats a token, both directions together."""
        divergence, tokens = engine.world.sum([self._divergence, float(self._tokens)])
        self._divergence, self._tokens = 0.0, 0
        return {"r_drop/divergence": divergence / tokens}


def run(step: Step, folder: StepDir, world: World, stop: StopRequest) -> dict[str, Any]:
    """Train the stage; returns how far it came."""
    stage = step.stage
    assert isinstance(stage, Sft)

    def scorer(model: Any, _: Origin) -> Scorer:
        smoothing, repeats = stage.label_smoothing, bool(stage.r_drop)
        made = (
            Repeater(model, smoothing=smoothing, weight=stage.r_drop) if repeats else Scorer(model, smoothing=smoothing)
        )
        if stage.neftune_alpha:
            embedding = model.get_input_embeddings()
            embeddings.add(embedding, made.places, alpha=stage.neftune_alpha, kind=stage.neftune_noise)
        return made

    def objective(*_: Any) -> CrossEntropy:
        return Consistency() if stage.r_drop else CrossEntropy()

    return train(step, folder, world, stop, scorer, objective)
