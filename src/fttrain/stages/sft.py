"""Supervised fine-tuning: cross-entropy of the trained tokens."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftlaunch.recipe.stages import Sft
from ftlaunch.run.layout import StageDir
from ftlaunch.run.records import RowLosses, TrainingResult
from ftlaunch.run.spec import StageSpec
from fttrain.answering.in_training import with_answers
from fttrain.artifact import StartPoint
from fttrain.data import feed as feeds
from fttrain.data.batches import MicroBatch
from fttrain.data.feed import Feed
from fttrain.distributed.stop_request import StopRequest
from fttrain.distributed.world import World
from fttrain.engine import Engine
from fttrain.model.scorer import RDropScorer, Scorer
from fttrain.noise import neftune
from fttrain.objectives.logps import Scores
from fttrain.objectives.r_drop import RDropScores
from fttrain.training.loop import Objective
from fttrain.training.metrics import keep
from fttrain.training.session import train


class CrossEntropy:
    """Sum of the trained tokens' cross-entropies, smoothed as the recipe says.

    The loss that balances experts, where there is one, counts for each micro-batch by its trained tokens.
    """

    def __init__(self, row_losses: Path | None = None) -> None:
        """`row_losses` is a file for the losses of single rows in the newest evaluation."""
        self._row_losses = row_losses
        self._router_loss = 0.0
        self._balanced = 0.0
        """Trained tokens that the sum above is over; 0 where no loss balances experts."""

    def weight(self, micro: MicroBatch) -> float:
        return float(micro.targets_N.numel())

    def loss(self, engine: Engine, micro: MicroBatch) -> Tensor:
        return engine.scorer.disturbance.loss(lambda: self._of(engine.scores(micro)))

    def _of(self, scores: Scores) -> Tensor:
        loss = -scores.smoothed_N.sum()
        if scores.router_loss is None:
            return loss
        count = scores.smoothed_N.numel()
        self._router_loss += count * float(scores.router_loss.detach())
        self._balanced += count
        # The loss is a sum over tokens that is divided later; the router's mean gets the same weight by its tokens.
        return loss + count * scores.router_loss

    def measures(self, engine: Engine) -> dict[str, float]:
        """The part of the step's loss that balances experts."""
        if not engine.scorer.router_weight:
            return {}
        total, count = engine.world.sum([self._router_loss, self._balanced])
        self._router_loss, self._balanced = 0.0, 0.0
        return {"router_loss": total / count}

    def evaluate(self, engine: Engine, feed: Feed) -> dict[str, float]:
        """Return loss, perplexity and accuracy over all trained tokens of held-out rows, weighted by token. Collective.

        The loss of each row goes to `evaluation.json`, so that runs can be compared row by row.
        """
        mine: dict[int, tuple[float, int]] = {}
        right = 0.0
        with engine.evaluating():
            for micro in feed.evaluation():
                scores = engine.scores(micro)
                right += float(scores.correct_N.sum())
                mine |= _of_rows(scores.logps_N, micro)
        # In the order of row numbers: the sum is the same to the last bit, however rows lie on ranks.
        every = {row: cost for part in engine.world.gather(mine) for row, cost in part.items()}
        rows = [every[row] for row in sorted(every)]
        nll, count = sum(nll for nll, _ in rows), sum(tokens for _, tokens in rows)
        (correct,) = engine.world.sum([right])
        if not count:
            return {}
        if engine.world.is_main and self._row_losses is not None:
            keep(self._row_losses, RowLosses(rows=rows), "the rows of an evaluation are")
        loss = nll / count
        perplexity = feeds.mean_perplexity(loss)
        return {"eval/loss": loss, "eval/perplexity": perplexity, "eval/token_accuracy": correct / count}


def _of_rows(logps_N: Tensor, micro: MicroBatch) -> dict[int, tuple[float, int]]:
    """Return cross-entropy and number of trained tokens of each row of a micro-batch, by the row's number."""
    # In fp64: fp32 sums of thousands of tokens differ with their order, and so with the number of ranks.
    costs = logps_N.new_zeros(len(micro.rows), dtype=torch.float64)
    costs = costs.index_add(0, micro.row_ids_N, -logps_N.double()).tolist()
    counts = micro.row_ids_N.bincount(minlength=len(micro.rows)).tolist()
    return dict(zip(micro.rows, zip(costs, counts, strict=True), strict=True))


class Consistency(CrossEntropy):
    """R-Drop: cross-entropy under two draws of dropout and noise, and the divergence between the two."""

    def __init__(self, row_losses: Path | None = None) -> None:
        super().__init__(row_losses)
        self._divergence = 0.0
        self._tokens = 0

    def loss(self, engine: Engine, micro: MicroBatch) -> Tensor:
        twice: RDropScores = engine.forward(micro)
        self._divergence += float(twice.divergence_N.sum())
        self._tokens += micro.targets_N.numel()
        return twice.losses_N.sum()

    def measures(self, engine: Engine) -> dict[str, float]:
        """Return the divergence of the two passes, in nats per token, both directions added."""
        divergence, tokens = engine.world.sum([self._divergence, float(self._tokens)])
        self._divergence, self._tokens = 0.0, 0
        return {"r_drop/divergence": divergence / tokens}


def run(spec: StageSpec, folder: StageDir, world: World, stop: StopRequest) -> TrainingResult:
    """Train the stage; return the content of result.json."""
    stage = spec.stage
    assert isinstance(stage, Sft)

    def scorer(model: Any, _: StartPoint) -> Scorer:
        if stage.r_drop:
            made = RDropScorer(model, smoothing=stage.label_smoothing, weight=stage.r_drop)
        else:
            made = Scorer(model, smoothing=stage.label_smoothing)
        if stage.neftune_alpha:
            embedding = model.get_input_embeddings()
            neftune.add(embedding, made.places, alpha=stage.neftune_alpha, kind=stage.neftune_noise)
        return made

    def objective(engine: Engine, _: Feed, origin: StartPoint) -> Objective:
        own = (Consistency if stage.r_drop else CrossEntropy)(folder.evaluation)
        return with_answers(own, spec, engine, origin, stop)

    return train(spec, folder, world, stop, scorer, objective)
