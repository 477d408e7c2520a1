"""Rollouts: answers sampled from the policy, in batches of prompts of like length, each batch with a cache of its own.

What is drawn for an answer depends on the seed and the answer's place alone, so a resumed run draws the same.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftlaunch.errors import UserError
from fttrain.engine import Engine
from fttrain.ppo.actor import ActorCritic, Decode


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. There is no top-k or top-p: the policy that is trained is the one that is sampled."""

    max_new_tokens: int
    batch_size: int
    """Answers that one process generates at the same time."""
    stop_ids: frozenset[int]
    """Tokens that end an answer and are part of it."""
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Response:
    """The policy's answer to one prompt."""

    ids_T: np.ndarray
    """int32; the stop token is among them."""
    logps_T: np.ndarray
    """float32: log-probability of each token, as it was drawn."""
    ended: bool
    """Whether it ended with a stop token, rather than at `max_new_tokens`."""


RollOut = Callable[[Sequence[np.ndarray], Sampling], list[Response]]
"""A function that returns an answer to each prompt (int ids), in order, the same on every rank. Collective."""


def refuse_what_cannot_answer(engine: Engine, actor: ActorCritic) -> None:
    """Raise UserError where a model cannot generate with a cache, for several padded prompts at once. Collective."""
    causal = actor.causal
    takes = inspect.signature(actor.body.forward).parameters
    if actor.is_alone:
        why = "must compute each row by itself, and answers are drawn side by side"
    elif "past_key_values" not in takes or not causal._supports_default_dynamic_cache():
        why = "keeps no cache that its answers could be drawn with side by side"
    else:
        try:
            found = _moved_by_padding(engine, actor)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            why = f"fails to answer with a cache ({type(error).__name__}: {error})"
        else:
            if found <= engine.verdict.get("bound", math.inf):
                return
            why = f"answers a prompt otherwise if that is padded on the left ({found:.2g} nats per token)"
    raise UserError(f"PPO cannot train a {causal.config.model_type} model: it {why}", "train it by dpo or orpo instead")


def _moved_by_padding(engine: Engine, actor: ActorCritic) -> float:
    """Return how far log-probabilities of a short prompt's next two tokens move where a longer one is answered, too."""
    long, short = (np.arange(3, 3 + length) for length in (17, 5))
    said: list[Tensor] = []
    with engine.evaluating(), actor.generating():
        for prompts in ([short], [short, long]):
            batch = _Batch(prompts, frozenset(), engine.world.device, actor.causal.config.get_text_config())
            for _ in range(2):
                logps_BV = engine.forward(batch.decode).log_softmax(-1)
                said.append(logps_BV[0])
                batch.take(logps_BV, np.zeros(len(prompts)))
    alone, padded = torch.stack(said[:2]), torch.stack(said[2:])
    found = float((alone - padded).abs().mean())
    return engine.world.max(found if math.isfinite(found) else math.inf)


def roll_out(engine: Engine, actor: ActorCritic, prompts: Sequence[np.ndarray], sampling: Sampling) -> list[Response]:
    """Sample answers by the actor itself; a `RollOut`."""
    rank, size = engine.world.rank, engine.world.size
    mine: dict[int, Response] = {}
    with engine.evaluating(), actor.generating():
        for batch in rounds([len(prompt) for prompt in prompts], sampling.batch_size, size):
            rows = batch[rank]
            answers = _generate(engine, [prompts[row] for row in rows], rows, sampling)
            mine |= dict(zip(rows, answers, strict=True))
    return engine.world.collect(mine, len(prompts))


def rounds(lengths: Sequence[int], batch_size: int, world_size: int) -> list[list[list[int]]]:
    """Return rows for each rank in each round, the longest first; a rank may have none in the last round."""
    # Sorted by length, the prompts of a round need little padding, and dealing them out one by one gives every rank
    # the same share of long ones. The longest come first, so that running out of memory shows at once.
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    width = batch_size * world_size
    groups = [order[start : start + width] for start in range(0, len(order), width)]
    return [[group[rank::world_size] for rank in range(world_size)] for group in groups]


def draw(logps_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Return [B]: the token at which the cumulated probability first exceeds each number of [0, 1)."""
    # One number per token makes an answer independent of the batch that it is drawn in, unlike torch.multinomial,
    # whose generator serves all lines. The sum of rounded probabilities is not quite 1: hence its last value as scale.
    cumulated_BV = logps_BV.double().exp().cumsum(-1)
    places_B1 = torch.searchsorted(cumulated_BV, uniform_B[:, None] * cumulated_BV[:, -1:], right=True)
    return places_B1[:, 0].clamp(max=logps_BV.shape[-1] - 1)


def _generate(engine: Engine, prompts: list[np.ndarray], rows: list[int], sampling: Sampling) -> list[Response]:
    """Return answers to one batch of prompts; a rank without prompts still takes part in its peers' forward passes."""
    noise = [np.random.Generator(np.random.PCG64([*sampling.seed, row])) for row in rows]
    uniform_BT = np.array([one.random(sampling.max_new_tokens) for one in noise])
    config = engine.scorer.causal.config.get_text_config()
    batch = _Batch(prompts, sampling.stop_ids, engine.world.device, config)
    for t in range(sampling.max_new_tokens):
        logps_BV = engine.forward(batch.decode).log_softmax(-1)
        batch.take(logps_BV, uniform_BT[:, t] if rows else np.zeros(0))
        if not _goes_on(engine, is_open=bool(batch.open)):
            break
    return batch.answers()


def _goes_on(engine: Engine, *, is_open: bool) -> bool:
    """Return whether to draw another token. Under ZeRO-3 a forward pass is a collective, so all ranks go on or none."""
    return bool(engine.world.max(float(is_open))) if engine.zero_stage == 3 else is_open


class _Batch:
    """Answers as they grow, one line of tensors each. Once half of the lines have ended, they are dropped."""

    def __init__(self, prompts: list[np.ndarray], stop_ids: frozenset[int], device: torch.device, config: Any) -> None:
        from transformers import DynamicCache

        self._stop_ids = stop_ids
        self._device = device
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._logps: list[list[float]] = [[] for _ in prompts]
        self._ended = [False] * len(prompts)
        self.open = list(range(len(prompts)))
        """Answers that have not ended."""
        self._lines = list(self.open) or [-1]
        """The answer of each line; -1 where there is none."""
        self.decode = self._first(prompts or [np.zeros(1, dtype=np.int64)], DynamicCache(config=config))
        """The next forward pass."""

    def _first(self, prompts: list[np.ndarray], cache: object) -> Decode:
        # Prompts are padded on the left, so that all answers grow at the same index; positions count real tokens only.
        width = max(map(len, prompts))
        ids, mask = (np.zeros((len(prompts), width), dtype=np.int64) for _ in range(2))
        for line, prompt in enumerate(prompts):
            ids[line, width - len(prompt) :], mask[line, width - len(prompt) :] = prompt, 1
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        ids_BT, mask_BP, positions_BT = (torch.from_numpy(array).to(self._device) for array in (ids, mask, positions))
        return Decode(ids_BT, mask_BP, positions_BT, cache)

    def take(self, logps_BV: Tensor, uniform: np.ndarray) -> None:
        """Draw a token for each line, given a number in [0, 1) per answer, and prepare the next forward pass."""
        drawn = np.array([uniform[answer] if answer >= 0 else 0.0 for answer in self._lines])
        tokens_B = draw(logps_BV, torch.from_numpy(drawn).to(self._device))
        logps_B = logps_BV.gather(1, tokens_B[:, None])[:, 0]
        for answer, token, logp in zip(self._lines, tokens_B.tolist(), logps_B.tolist(), strict=True):
            if answer in self.open:
                self._tokens[answer].append(token)
                self._logps[answer].append(logp)
                self._ended[answer] = token in self._stop_ids
        self.open = [answer for answer in self.open if not self._ended[answer]]
        self._advance(tokens_B)

    def _advance(self, tokens_B: Tensor) -> None:
        before = self.decode
        mask_BP = torch.cat([before.mask_BP, torch.ones_like(before.mask_BP[:, :1])], 1)
        positions_B1 = before.position_ids_BT[:, -1:] + 1
        kept = [line for line, answer in enumerate(self._lines) if answer in self.open]
        if kept and 2 * len(kept) <= len(self._lines):
            lines = torch.tensor(kept, device=self._device)
            before.cache.reorder_cache(lines)  # which all kinds of layers have; selecting, those with a state have not
            tokens_B, mask_BP, positions_B1 = tokens_B[lines], mask_BP[lines], positions_B1[lines]
            self._lines = [self._lines[line] for line in kept]
        self.decode = Decode(tokens_B[:, None], mask_BP, positions_B1, before.cache)

    def answers(self) -> list[Response]:
        parts = zip(self._tokens, self._logps, self._ended, strict=True)
        return [
            Response(np.array(ids, dtype=np.int32), np.array(logps, dtype=np.float32), end) for ids, logps, end in parts
        ]
