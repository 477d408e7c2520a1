"""Experience: a rollout's answers with rewards, advantages and all else that training on them needs."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ftlaunch.recipe.stages import Ppo
from fttrain.data.batches import MicroBatch, split_batch
from fttrain.data.token_set import Group, Tokens
from fttrain.engine import Engine
from fttrain.objectives import ppo
from fttrain.objectives.ppo import Moments
from fttrain.ppo.actor import REFERENCE, ActorCritic, ActorOutput
from fttrain.ppo.rollout import Response

MISMATCH = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.1}
"""Largest mean |Δ log p| (nats per token) between drawing and scoring that rounding explains, by number format."""


@dataclass(frozen=True, kw_only=True)
class PpoMicro(MicroBatch):
    """A micro-batch of answers with their values at the time of the rollout, token by token."""

    old_logps_N: Tensor
    old_values_N: Tensor
    advantages_N: Tensor
    returns_N: Tensor


@dataclass(frozen=True)
class Scored:
    """Log-probabilities and values of a rollout's answers, padded with 0; the same on every rank."""

    logps_BT: Tensor
    values_BT: Tensor
    reference_logps_BT: Tensor


@dataclass(frozen=True)
class Experience:
    """One rollout, the same on every rank; B answers. Tensors only, so that a checkpoint can carry it."""

    ids_BP: Tensor
    """int32: prompt and answer, padded with 0."""
    prompt_lengths_B: Tensor
    answer_lengths_B: Tensor
    ended_B: Tensor
    scores_B: Tensor
    """Scores as the reward gave them."""
    kl_B: Tensor
    """Nats per answer."""
    kl_coefficient: Tensor
    """The coefficient in its rewards, a scalar."""
    mismatch: Tensor
    """Mean |Δ log p| between drawing and scoring, nats per token; a scalar."""
    logps_BT: Tensor
    values_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor

    def __len__(self) -> int:
        return len(self.scores_B)

    @property
    def mask_BT(self) -> Tensor:
        return _mask(self.answer_lengths_B, self.logps_BT)

    def row(self, index: int) -> Tokens:
        """Return one prompt and answer, with the answer's tokens trained."""
        start = int(self.prompt_lengths_B[index])
        end = start + int(self.answer_lengths_B[index])
        return self.ids_BP[index, :end].numpy(), np.arange(end) >= start

    def measures(self) -> dict[str, float]:
        """Return what metrics.jsonl says of the rollout."""
        mask_BT = self.mask_BT
        return {
            "reward": float(self.scores_B.mean()),
            "reward/std": float(self.scores_B.std(correction=0)),
            "kl": float(self.kl_B.mean()),
            "kl_coefficient": float(self.kl_coefficient),
            "answer_tokens": float(self.answer_lengths_B.double().mean()),
            "answers_ended": float(self.ended_B.double().mean()),
            "explained_variance": ppo.explained_variance(self.values_BT[mask_BT], self.returns_BT[mask_BT]),
            "rollout_mismatch": float(self.mismatch),
        }

    def micros(self, rows: Sequence[int], engine: Engine, *, accumulation: int) -> list[MicroBatch]:
        """This rank's micro-batches of a mini-batch of answers."""
        micros = split_rows([self.row(row) for row in rows], engine, accumulation, packing=engine.layout.packing)
        return [self._with_worth(micro, [rows[index] for index in micro.rows]) for micro in micros]

    def _with_worth(self, micro: MicroBatch, rows: list[int]) -> PpoMicro:
        # A micro-batch lists its trained tokens row by row, so values laid end to end row by row match them.
        def of_tokens(values_BT: Tensor) -> Tensor:
            parts = [values_BT[row, : int(self.answer_lengths_B[row])] for row in rows]
            return torch.cat([values_BT.new_empty(0), *parts]).to(micro.targets_N.device)

        plain = {field.name: getattr(micro, field.name) for field in fields(MicroBatch)}
        worth = (self.logps_BT, self.values_BT, self.advantages_BT, self.returns_BT)
        return PpoMicro(**plain, **dict(zip(WORTH, map(of_tokens, worth), strict=True)))


WORTH = ("old_logps_N", "old_values_N", "advantages_N", "returns_N")


def rows_of(prompts: Sequence[np.ndarray], answers: Sequence[Response]) -> list[Tokens]:
    """Return prompts and answers end to end, with the answers' tokens to be scored."""
    joined = [np.concatenate([prompt, answer.ids_T]) for prompt, answer in zip(prompts, answers, strict=True)]
    return [(ids, np.arange(len(ids)) >= len(prompt)) for ids, prompt in zip(joined, prompts, strict=True)]


def split_rows(rows: Sequence[Tokens], engine: Engine, rounds: int, *, packing: bool) -> list[MicroBatch]:
    """This rank's share of the rows, in as many micro-batches as there are rounds."""
    world = engine.world
    return split_batch(
        [Group((row,)) for row in rows],
        rank=world.rank,
        world_size=world.size,
        accumulation=rounds,
        packing=packing,
        device=world.device,
    )


def score(engine: Engine, actor: ActorCritic, rows: Sequence[Tokens], *, micro_batch_size: int) -> Scored:
    """Return what policy, value head and reference compute for each trained token of the rows. Collective."""
    world = engine.world
    # Every rank makes the same number of forward passes, some of them empty: under ZeRO-3 each one is a collective.
    rounds = -(-len(rows) // (micro_batch_size * world.size))
    mine: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    with engine.evaluating():
        for micro in split_rows(rows, engine, rounds, packing=engine.layout.packing):
            acted: ActorOutput = engine.forward(micro)
            with actor.using_adapter(REFERENCE):
                reference: ActorOutput = engine.forward(micro)
            counts = [int(rows[row][1].sum()) for row in micro.rows]
            # Each of the three columns is cut by row; then each row gets its three pieces.
            columns = [part.cpu().split(counts) for part in (acted.logps_N, acted.values_N, reference.logps_N)]
            mine.update(zip(micro.rows, zip(*columns, strict=True), strict=True))
    columns = zip(*world.collect(mine, len(rows)), strict=True)
    return Scored(*(pad_sequence(list(column), batch_first=True) for column in columns))


def make_experience(
    stage: Ppo,
    prompts: Sequence[np.ndarray],
    answers: Sequence[Response],
    scored: Scored,
    scores_B: Tensor,
    *,
    kl_coefficient: float,
    moments: Moments,
) -> Experience:
    """Return the experience of a rollout whose answers got these scores; `moments` include them already."""
    # The order is TRL's: scale scores, subtract the penalty, spread rewards over tokens, whiten them, GAE, whiten
    # advantages. KL goes into the rewards, not into the loss, so advantages already account for it.
    lengths_B = torch.tensor([len(answer.ids_T) for answer in answers])
    ended_B = torch.tensor([answer.ended for answer in answers])
    mask_BT = _mask(lengths_B, scored.logps_BT)
    kl_BT = ppo.token_kl(scored.logps_BT, scored.reference_logps_BT, estimator=stage.kl_estimator) * mask_BT
    shaped_rewards_B = moments.normalise(scores_B) if stage.score_scaling == "running" else scores_B
    shaped_rewards_B = shaped_rewards_B - stage.missing_eos_penalty * ~ended_B
    rewards_BT = ppo.token_rewards(shaped_rewards_B, kl_BT, mask_BT, coefficient=kl_coefficient)
    if stage.score_scaling == "batch":
        rewards_BT = _on(mask_BT, ppo.whiten(rewards_BT[mask_BT], shift_mean=False))
    advantages_BT, returns_BT = ppo.gae(rewards_BT, scored.values_BT, mask_BT, gamma=stage.gamma, lam=stage.gae_lambda)
    if stage.whiten_advantages:
        advantages_BT = _on(mask_BT, ppo.whiten(advantages_BT[mask_BT]))
    rows = [torch.from_numpy(ids) for ids, _ in rows_of(prompts, answers)]
    drawn_BT = pad_sequence([torch.from_numpy(answer.logps_T) for answer in answers], batch_first=True)
    return Experience(
        ids_BP=pad_sequence(rows, batch_first=True),
        prompt_lengths_B=torch.tensor([len(prompt) for prompt in prompts]),
        answer_lengths_B=lengths_B,
        ended_B=ended_B,
        scores_B=scores_B,
        kl_B=kl_BT.sum(1),
        kl_coefficient=torch.tensor(kl_coefficient, dtype=torch.float64),
        mismatch=(drawn_BT - scored.logps_BT)[mask_BT].abs().mean(),
        logps_BT=scored.logps_BT,
        values_BT=scored.values_BT * mask_BT,
        advantages_BT=advantages_BT,
        returns_BT=returns_BT,
    )


def _mask(lengths_B: Tensor, like_BT: Tensor) -> Tensor:
    return torch.arange(like_BT.shape[1]) < lengths_B[:, None]


def _on(mask_BT: Tensor, values_N: Tensor) -> Tensor:
    """Return the values at the positions of the mask, in order; 0 elsewhere."""
    return torch.zeros(mask_BT.shape, dtype=values_N.dtype).masked_scatter(mask_BT, values_N)
