"""The one module of PPO: a policy, the head that foresees its rewards, and the reference that it is held to."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fttrain.adapters import speaking_as
from fttrain.data.batches import Micro
from fttrain.model import Scorer

REFERENCE = "reference"
"""Name of the adapter that holds the policy's start. Where there is none of that name, the bare base is the start."""


@dataclass(frozen=True)
class Decode:
    """One forward pass of generation: tokens that follow what the cache holds, a line for each of B answers."""

    input_ids_BT: Tensor
    mask_BP: Tensor
    """What may be attended to, of all tokens so far: false on the padding to the left of a prompt."""
    position_ids_BT: Tensor
    cache: Any
    """transformers' DynamicCache; grows by T tokens."""


class Acted(NamedTuple):
    """What policy and value head say of each token of a micro-batch's answers."""

    logps_N: Tensor
    entropy_N: Tensor
    """Empty without gradients, where nobody asks for it."""
    values_N: Tensor
    """Reward that is still to come when the token is chosen."""


class ValueHead(nn.Module):
    """One number from each hidden state, in fp32 whatever the model's format; 0 at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_ND: Tensor) -> Tensor:
        # A matrix product would be done in 16 bits under autocast.
        return (hidden_ND.float() * self.weight.float()).sum(-1) + self.bias.float()


class Actor(Scorer):
    """A Scorer that also foresees rewards, generates, and speaks as the reference. One base serves all of them.

    The value head reads the policy's own hidden states, so one pass gives both. Dropout is off: what is sampled, scored
    and trained must be one policy.
    """

    _is_reference = False

    def __init__(self, model: nn.Module, frozen: nn.Module | None, *, temperature: float) -> None:
        """`frozen` is a copy of a policy whose own weights are trained; an adapter's start needs none."""
        super().__init__(model)
        self.frozen = frozen
        self.value_head = ValueHead(self._causal().get_input_embeddings().embedding_dim)
        self._temperature = temperature
        _turn_dropout_off(self)

    def forward(self, asked: Micro | Decode) -> Any:
        """`Acted` for a micro-batch; the next token's logits [B, V] in fp32 for a `Decode`."""
        if isinstance(asked, Decode):
            return self._next_logits(asked)
        hidden_ND = self._hidden(asked)[asked.places_N]
        scores = self._scores(hidden_ND, asked, with_entropy=torch.is_grad_enabled())
        return Acted(scores.smoothed_N, scores.entropy_N, self.value_head(hidden_ND))

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within, log-probabilities are those of the policy as the stage found it."""
        self._is_reference = True
        try:
            with speaking_as(self.model, REFERENCE):
                yield
        finally:
            self._is_reference = False

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Within, `Decode` is understood: attention that knows a cache stands in for that of packed rows."""
        causal = self._causal()
        held = causal.config._attn_implementation
        causal.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            causal.set_attn_implementation(held)

    def _causal(self) -> Any:
        return self.frozen if self._is_reference and self.frozen is not None else super()._causal()

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        return super()._logits(hidden_ND) / self._temperature

    def _next_logits(self, asked: Decode) -> Tensor:
        hidden_BTD = (
            self._causal()
            .base_model(
                input_ids=asked.input_ids_BT,
                attention_mask=asked.mask_BP,
                position_ids=asked.position_ids_BT,
                past_key_values=asked.cache,
                use_cache=True,
            )
            .last_hidden_state
        )
        return self._logits(hidden_BTD[:, -1]).float()


def _turn_dropout_off(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(getattr(part, "attention_dropout", None), float):
            part.attention_dropout = 0.0  # type: ignore[assignment]
