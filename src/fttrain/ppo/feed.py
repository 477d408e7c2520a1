"""The feed of PPO: rollouts of the policy, scored, turned into experience and served as micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftlaunch.recipe.stages import Ppo
from ftlaunch.run.records import Counts
from ftlaunch.run.spec import StageSpec
from fttrain.data.batches import MicroBatch
from fttrain.data.order import Order
from fttrain.data.prompts import Prompt, Prompts
from fttrain.engine import Engine
from fttrain.objectives import ppo
from fttrain.objectives.ppo import Moments
from fttrain.ppo.actor import ActorCritic
from fttrain.ppo.experience import MISMATCH, Experience, make_experience, rows_of, score
from fttrain.ppo.rewards import Reward, ScoredResponse
from fttrain.ppo.rollout import Response, RollOut, Sampling
from fttrain.training.metrics import MetricsLog

SAMPLES = 8
"""Answers of a rollout that are logged."""
TRAINING, MINI_BATCHES, EVALUATION = range(3)
"""What a random generator is for: a part of its seed, after the recipe's seed and before the rollout's number."""


@dataclass
class Steering:
    """State that one rollout hands to the next."""

    kl_coefficient: float
    moments: Moments = field(default_factory=Moments)
    """Moments of all scores so far."""

    def follow(self, stage: Ppo, experience: Experience) -> None:
        """Move the KL coefficient towards the recipe's target, by a rollout's KL."""
        if stage.kl_target is not None:
            self.kl_coefficient = ppo.adapt_kl(
                self.kl_coefficient,
                float(experience.kl_B.mean()),
                target=stage.kl_target,
                horizon=stage.kl_horizon,
                answers=len(experience),
            )


class RolloutFeed:
    """A Feed whose rows the policy writes itself: one rollout serves several optimizer steps. Checkpoints carry it."""

    def __init__(
        self,
        spec: StageSpec,
        stage: Ppo,
        prompts: Sequence[Prompts],
        tokenizer: Any,
        engine: Engine,
        reward: Reward,
        roll_out: RollOut,
        samples: Path,
    ) -> None:
        self._step = spec
        self._stage = stage
        self._train = [one.train for one in prompts]
        self._counts = [one.counts for one in prompts]
        self._test = [prompt for one in prompts for prompt in one.test]
        self._end_ids = frozenset[int]().union(*(one.end_ids for one in prompts))
        self._tokenizer = tokenizer
        self._engine = engine
        assert isinstance(engine.scorer, ActorCritic)
        self._actor = engine.scorer
        self._reward = reward
        self._roll_out = roll_out
        self._samples_file = samples
        self._samples: MetricsLog | None = None
        self._size = stage.rollout_size or stage.batch_size
        self._mini_batches = self._size // stage.batch_size
        self._steps_each = self._mini_batches * stage.ppo_epochs
        # One prompt per step of `Order`; a rollout takes as many as it needs, across epochs.
        weights = [data.weight for data in spec.data.values()]
        self._order = Order([len(rows) for rows in self._train], weights, batch_size=1, seed=spec.seed)
        rollouts = max(1, round((stage.epochs or 1) * self._order.epoch_rows / self._size))
        self.num_steps = stage.steps or rollouts * self._steps_each
        self._steering = Steering(stage.kl_coefficient)
        self._rollout = -1
        """Number of the rollout that `experience` is of."""
        self.experience: Experience | None = None

    def step(self, number: int) -> list[MicroBatch]:
        rollout = (number - 1) // self._steps_each
        if rollout != self._rollout:
            self.experience = self._collect_rollout(rollout, number)
            self._rollout = rollout
        assert self.experience is not None
        return self.experience.micros(self._rows(number), self._engine, accumulation=self._step.accumulation)

    def names(self, number: int, rows: Sequence[int]) -> list[str]:
        """The prompts that these answers of a mini-batch are to."""
        prompts, answers = self._prompts((number - 1) // self._steps_each), self._rows(number)
        return [prompts[answers[row]].where for row in rows]

    def epoch_at(self, number: int) -> float:
        return number / self._steps_each * self._size / self._order.epoch_rows

    def evaluation(self) -> Iterator[MicroBatch]:
        """Return no rows: the policy's own answers are evaluated, by `evaluate`."""
        return iter(())

    def counts(self) -> list[Counts]:
        return self._counts

    def evaluate(self) -> dict[str, float]:
        """Return the mean score of answers to held-out prompts, sampled with the same seed each time. Collective."""
        if not self._test:
            return {}
        answers = self._answers(self._test, (EVALUATION,))
        return {"eval/reward": float(self._scores(self._test, answers).mean())}

    def state_dict(self) -> dict[str, Tensor]:
        """Return experience, KL coefficient and score statistics, for a checkpoint."""
        # A rollout serves several optimizer steps; without it a resume in between would have to sample it again from a
        # policy that has changed since.
        state = torch.tensor(
            [self._rollout, self._steering.kl_coefficient, *self._steering.moments], dtype=torch.float64
        )
        held = {} if self.experience is None else vars(self.experience)
        return {"steering": state, **{f"experience|{name}": tensor for name, tensor in held.items()}}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` returned."""
        rollout, coefficient, *moments = tensors["steering"].tolist()
        self._rollout, self._steering = int(rollout), Steering(coefficient, Moments(*moments))
        held = {one.name: tensors[f"experience|{one.name}"] for one in fields(Experience)}
        self.experience = Experience(**held)

    def _rows(self, number: int) -> list[int]:
        """Return the answers of a rollout that optimizer step `number` trains on."""
        # Steps of a rollout: `ppo_epochs` passes over its answers, each pass in an order of its own, cut into
        # mini-batches of `batch_size`. Everything follows from the step's number, so a resume needs no position.
        rollout, inner = divmod(number - 1, self._steps_each)
        epoch, index = divmod(inner, self._mini_batches)
        key = [self._step.seed, MINI_BATCHES, rollout, epoch]
        shuffled = np.random.Generator(np.random.PCG64(key)).permutation(self._size)
        return shuffled[index * self._stage.batch_size : (index + 1) * self._stage.batch_size].tolist()

    def _prompts(self, rollout: int) -> list[Prompt]:
        first = rollout * self._size + 1
        places = [self._order.step(index)[0] for index in range(first, first + self._size)]
        return [self._train[source][row] for source, row in places]

    def _collect_rollout(self, rollout: int, number: int) -> Experience:
        """Sample answers to the prompts of a rollout, which begins with optimizer step `number`, and score them."""
        prompts = self._prompts(rollout)
        answers = self._answers(prompts, (TRAINING, rollout))
        scores_B = self._scores(prompts, answers)
        ids = [prompt.ids_T for prompt in prompts]
        scored = score(self._engine, self._actor, rows_of(ids, answers), micro_batch_size=self._step.micro_batch_size)
        # Scores are scaled by the moments that include them, as TRL does; the coefficient changes only afterwards.
        steering = self._steering
        steering.moments = steering.moments.with_more(scores_B)
        experience = make_experience(
            self._stage,
            ids,
            answers,
            scored,
            scores_B,
            kl_coefficient=steering.kl_coefficient,
            moments=steering.moments,
        )
        self._refuse_mismatch(experience)
        steering.follow(self._stage, experience)
        if rollout % self._stage.samples_every == 0:
            self._log(number, list(zip(prompts, answers, strict=True)), experience)
        return experience

    def _answers(self, prompts: Sequence[Prompt], key: tuple[int, ...]) -> list[Response]:
        sampling = Sampling(
            max_new_tokens=self._stage.max_new_tokens,
            batch_size=self._stage.generation_batch_size,
            stop_ids=self._end_ids,
            seed=(self._step.seed, *key),
        )
        return self._roll_out([prompt.ids_T for prompt in prompts], sampling)

    def _scores(self, prompts: Sequence[Prompt], answers: Sequence[Response]) -> Tensor:
        said = [ScoredResponse(prompt, self._text(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
        return self._reward(self._engine, said)

    def _text(self, answer: Response) -> str:
        return self._tokenizer.decode(answer.ids_T.tolist(), skip_special_tokens=True).strip()

    def _refuse_mismatch(self, experience: Experience) -> None:
        limit, found = MISMATCH[self._step.model.dtype], float(experience.mismatch)
        assert found <= limit, (
            f"the policy that answers is not the one that is trained: |Δ log p| {found:.3g} per token"
        )

    def _log(self, number: int, said: Sequence[tuple[Prompt, Response]], experience: Experience) -> None:
        if self._samples is None:  # opened here, as only now it is known after which step the stage was resumed
            last_step = self._rollout * self._steps_each + 1
            is_main = self._engine.world.is_main
            self._samples = MetricsLog(self._samples_file, is_main=is_main, last_step=last_step)
        for index, (prompt, answer) in enumerate(said[:SAMPLES]):
            sample = {
                "prompt": prompt.text,
                "answer": self._text(answer),
                "reward": float(experience.scores_B[index]),
                "kl": float(experience.kl_B[index]),
                "ended": answer.ended,
            }
            self._samples.write(number, sample)
