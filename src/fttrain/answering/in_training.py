"""Answers to held-out prompts at the evaluations of a stage that trains, and their scores.

The model that is trained answers as it stands, on all ranks together. Nothing of training is changed by it: it draws
nothing, and modes, attention and random states are afterwards what they were.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ftlaunch.errors import UserError
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.stages import EVAL_BATCH, EVAL_NEW_TOKENS, EVAL_PROMPTS, Training
from ftlaunch.rows.conversations import is_paired
from ftlaunch.run.spec import StageSpec
from fttrain.answering.examination import Exam, examine, set_exam
from fttrain.answering.generation import Decoding
from fttrain.artifact import StartPoint
from fttrain.checkpoint import random_states
from fttrain.data.batches import MicroBatch
from fttrain.data.feed import Feed
from fttrain.data.sources import settled
from fttrain.distributed.stop_request import StopRequest
from fttrain.engine import Engine
from fttrain.evaluation.scoring import Inputs, load_metric, score
from fttrain.model import packing
from fttrain.model.scorer import load_tokenizer
from fttrain.training.loop import Objective

T = TypeVar("T")
R = TypeVar("R")


def with_answers(
    objective: Objective, spec: StageSpec, engine: Engine, origin: StartPoint, stop: StopRequest
) -> Objective:
    """Return the objective, whose evaluations also score answers if the stage names metrics of them. Collective.

    Raises UserError where metrics, prompts or answers cannot be had: one token is generated and scored for a trial.
    """
    assert isinstance(spec.stage, Training)
    return _Answering(objective, spec, spec.stage, engine, origin, stop) if spec.stage.eval_metrics else objective


class _Answering:
    """An objective whose evaluations also have scores of answers."""

    def __init__(
        self,
        objective: Objective,
        spec: StageSpec,
        stage: Training,
        engine: Engine,
        origin: StartPoint,
        stop: StopRequest,
    ) -> None:
        self._objective = objective
        self._metrics = stage.eval_metrics
        self._stop = stop
        self._engine = engine
        for metric in self._metrics:
            load_metric(metric)
        self._tokenizer = load_tokenizer(origin.tokenizer, origin.base.revision)
        datas = [settled(data) for data in spec.data.values() if data.test or data.eval]
        most = -(-(stage.eval_prompts or EVAL_PROMPTS) // max(len(datas), 1))
        self._exams = [_exam(data, self._tokenizer, spec.seed, most) for data in datas]
        self._decoding = Decoding(
            stage.eval_max_new_tokens or EVAL_NEW_TOKENS,
            # Padded rows are computed one by one in training where padding changes them.
            batch_size=1 if engine.scorer.is_alone else EVAL_BATCH,
            temperature=stage.eval_temperature or 0.0,
            beams=stage.eval_beams or 1,
        )
        self._seed = spec.seed + engine.world.rank
        self._scores(
            replace(self._decoding, max_new_tokens=1),
            [Exam(asked=exam.asked[:1], end_ids=exam.end_ids) for exam in self._exams],
        )

    def weight(self, micro: MicroBatch) -> float:
        return self._objective.weight(micro)

    def loss(self, engine: Engine, micro: MicroBatch) -> Tensor:
        return self._objective.loss(engine, micro)

    def measures(self, engine: Engine) -> dict[str, float]:
        return self._objective.measures(engine)

    def evaluate(self, engine: Engine, feed: Feed) -> dict[str, float]:
        """Return what the objective finds, and the scores of the answers. Collective."""
        return {**self._objective.evaluate(engine, feed), **self._scores(self._decoding, self._exams)}

    def _scores(self, decoding: Decoding, exams: list[Exam]) -> dict[str, float]:
        """Return the scores of the answers, the same on every rank."""
        answers, references = list[str](), list[list[str]]()
        with _generating(self._engine) as model:
            torch.manual_seed(self._seed)  # answers are drawn alike at each evaluation
            for exam in exams:
                inputs = examine(model, self._tokenizer, exam, decoding, self._share).inputs["answers"]
                answers += inputs.predictions
                references += inputs.references
        scored = score(self._metrics, {"answers": Inputs(answers, references)}, 0, 0)
        found = {f"eval/{key}": one.value for key, one in scored.scores.items()}
        # A metric of one's own may draw, and ranks must agree on which evaluation is the best.
        return self._engine.world.from_main(found)

    def _share(self, items: Sequence[T], work: Callable[[Sequence[T]], Iterable[Mapping[int, R]]]) -> list[R]:
        """A `Share` over all ranks."""
        # Under ZeRO-3 a forward pass is a collective, so all ranks answer as many prompts, some twice if need be.
        world = self._engine.world
        turns = -(-len(items) // world.size)
        places = [(world.rank + turn * world.size) % len(items) for turn in range(turns)]
        mine: dict[int, R] = {}
        for some in work([items[place] for place in places]):
            mine |= {places[at]: value for at, value in some.items()}
            self._stop.poll()  # a sign of life; a request is heeded at the next step
        return world.collect(mine, len(items))


def _exam(data: Data, tokenizer: Any, seed: int, most: int) -> Exam:
    """Return the prompts held out of a data set. Raises UserError where they have no answers to compare with."""
    if (data.train_on != "answer" and not is_paired(data)) or data.format == "text" or data.streaming:
        message = f"eval_metrics: of {data.path} only last answers of rows read at once can be compared with"
        raise UserError(message, "remove eval_metrics, or evaluate another table in an evaluate stage")
    return set_exam(data, tokenizer, seed, {"answers"}, most=most)


@contextmanager
def _generating(engine: Engine) -> Iterator[Any]:
    """Within, the model that is trained can generate."""
    states = random_states.take()
    try:
        with engine.evaluating(), packing.by_itself(engine.scorer.causal), engine.autocast():
            yield engine.scorer.model
    finally:
        random_states.restore(states)
