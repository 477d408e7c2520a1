"""The one module of PPO: policy, value head, reference and reward model around a single base."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fttrain.adapters import using_adapter
from fttrain.data.batches import MicroBatch
from fttrain.model import dropout, packing
from fttrain.model.scorer import RewardHead, Scorer

POLICY, REFERENCE, REWARD_MODEL = "policy", "reference", "reward_model"
"""Which model a forward pass computes. The last two name adapters next to the policy's; without one the bare base."""


@dataclass(frozen=True)
class Decode:
    """One forward pass of generation: tokens that follow what the cache holds, a line for each of B answers."""

    input_ids_BT: Tensor
    mask_BP: Tensor
    """[B, P], P all tokens so far: false on the padding to the left of a prompt, which nothing attends to."""
    position_ids_BT: Tensor
    cache: Any
    """transformers' DynamicCache; grows by T tokens."""


class ActorOutput(NamedTuple):
    """What policy and value head compute for each token of a micro-batch's answers."""

    logps_N: Tensor
    entropy_N: Tensor
    """Nats; empty without gradients, where nobody needs it."""
    values_N: Tensor
    """Reward that is still to come when the token is chosen."""


class ValueHead(RewardHead):
    """A linear head that predicts the rewards still to come from each hidden state; it starts at 0."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        nn.init.zeros_(self.weight)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_BD: Tensor) -> Tensor:
        return super().forward(hidden_BD) + self.bias.float()


class ActorCritic(Scorer):
    """A policy that also predicts rewards, generates, and computes its reference and reward model: one base serves all.

    The value head reads the policy's own hidden states, so one pass gives both. Dropout is off: what is sampled, scored
    and trained must be one policy.
    """

    _speaker = POLICY

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float,
        frozen: nn.Module | None = None,
        reward_model: nn.Module | None = None,
    ) -> None:
        """`frozen` is a copy of a policy whose own weights are trained; an adapter's start needs none.

        `reward_model` is the head that goes with the adapter of that name, or a sequence classifier; None where a
        function gives the scores.
        """
        super().__init__(model)
        self.frozen = frozen
        self.reward_model = reward_model
        self.value_head = ValueHead(self._of(self.causal).width)
        self._temperature = temperature
        dropout.turn_off(self)

    def answer(self, inputs: MicroBatch | Decode) -> Any:
        """`ActorOutput` of a micro-batch, row scores [B] as the reward model; for `Decode` logits [B, V] in fp32."""
        if isinstance(inputs, Decode):
            return self._next_logits(inputs)
        if self._speaker == REWARD_MODEL:
            return self._scores_of_rows(inputs)
        hidden_ND = self._hidden(inputs)[inputs.positions_N]
        scores = self._scores(hidden_ND, inputs, with_entropy=torch.is_grad_enabled())
        return ActorOutput(scores.smoothed_N, scores.entropy_N, self.value_head(hidden_ND))

    @contextmanager
    def using_adapter(self, name: str) -> Iterator[None]:
        """Within, REFERENCE computes log-probabilities of the stage's initial policy and REWARD_MODEL scores rows."""
        self._speaker = name
        try:
            with using_adapter(self.model, name):
                yield
        finally:
            self._speaker = POLICY

    def generating(self) -> AbstractContextManager[None]:
        """Within, `Decode` can be computed: attention with a cache takes the place of that for packed rows."""
        return packing.by_itself(self.causal)

    def _causals(self) -> list[Any]:
        return [super().causal, *([] if self.frozen is None else [self.frozen])]

    @property
    def causal(self) -> Any:
        """The transformers model that the current pass computes."""
        return self.frozen if self._speaker == REFERENCE and self.frozen is not None else super().causal

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        # The policy is the distribution that is sampled, so its log-probabilities are those of the temperature as well.
        return super()._logits(hidden_ND) / self._temperature

    def _scores_of_rows(self, micro: MicroBatch) -> Tensor:
        if isinstance(self.reward_model, RewardHead):
            return self.reward_model(self._hidden(micro)[micro.last_token_B])
        reward_model: Any = self.reward_model
        # A classifier finds a row's last token by looking for its own padding id, which need not be the batch's.
        is_real = micro.lengths > 0
        ids = micro.input_ids.masked_fill(~is_real, reward_model.config.pad_token_id)
        return reward_model(input_ids=ids, attention_mask=is_real.long()).logits[: len(micro.rows), 0].float()

    def _next_logits(self, inputs: Decode) -> Tensor:
        halves = self._of(self.causal)
        passed = halves.body(
            input_ids=inputs.input_ids_BT,
            attention_mask=inputs.mask_BP,
            position_ids=halves.positions(inputs.position_ids_BT),
            past_key_values=inputs.cache,
            use_cache=True,
        )
        return self._logits(passed.last_hidden_state[:, -1]).float()
