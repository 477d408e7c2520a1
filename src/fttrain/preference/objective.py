"""The objective of all stages that learn from pairs of answers, and its metrics."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fttrain.data.batches import MicroBatch
from fttrain.data.feed import Feed
from fttrain.engine import Engine
from fttrain.objectives.preference import calibration_error


class Compared(NamedTuple):
    """Losses and rewards of the pairs of a micro-batch."""

    losses_G: Tensor
    rewards_G2: Tensor
    """Rewards of the chosen and the rejected answer, without gradient; a policy's are the implicit ones of its loss."""


Compare = Callable[[Engine, MicroBatch], Compared]


class Comparison:
    """Mean loss over pairs, whatever they are compared by."""

    def __init__(self, compare: Compare) -> None:
        self._compare = compare
        self._sums = torch.zeros(4, dtype=torch.float64)

    def weight(self, micro: MicroBatch) -> float:
        return float(micro.margins_G.numel())

    def loss(self, engine: Engine, micro: MicroBatch) -> Tensor:
        compared = self._compare(engine, micro)
        self._sums += _sums(compared.rewards_G2)
        return compared.losses_G.sum()

    def measures(self, engine: Engine) -> dict[str, float]:
        """Return, over the pairs of the step, how often the chosen answer has the larger reward, and both means."""
        pairs, right, chosen, rejected = engine.world.sum(self._sums.tolist())
        self._sums.zero_()
        return _means("rewards", pairs, right, chosen, rejected)

    def evaluate(self, engine: Engine, feed: Feed) -> dict[str, float]:
        """Return mean loss, accuracy, margin and calibration error over the held-out pairs. Collective."""
        losses: list[float] = []
        rewards = [torch.zeros(0, 2)]
        with engine.evaluating():
            for micro in feed.evaluation():
                compared = self._compare(engine, micro)
                losses += compared.losses_G.tolist()
                rewards.append(compared.rewards_G2.cpu())
        # The calibration error is no mean over pairs, so every rank gets all pairs and computes it alike.
        parts = engine.world.gather((losses, torch.cat(rewards).tolist()))
        every_loss = [loss for losses, _ in parts for loss in losses]
        if not every_loss:
            return {}
        rewards_G2 = torch.tensor([reward for _, rewards in parts for reward in rewards])
        return {
            "eval/loss": sum(every_loss) / len(every_loss),
            **_means("eval/rewards", *_sums(rewards_G2).tolist()),
            "eval/rewards/calibration_error": calibration_error(rewards_G2[:, 0] - rewards_G2[:, 1]),
        }


def _sums(rewards_G2: Tensor) -> Tensor:
    """Return [4] float64: pairs, pairs whose chosen answer has the larger reward, and the sums of both rewards."""
    right = (rewards_G2[:, 0] > rewards_G2[:, 1]).sum()
    return torch.stack([right.new_tensor(len(rewards_G2)), right, *rewards_G2.sum(0)]).double().cpu()


def _means(name: str, pairs: float, right: float, chosen: float, rejected: float) -> dict[str, float]:
    return {
        f"{name}/accuracy": right / pairs,
        f"{name}/margin": (chosen - rejected) / pairs,
        f"{name}/chosen": chosen / pairs,
        f"{name}/rejected": rejected / pairs,
    }


def answer_logps(logps_N: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """Return ([G, 2] log-probability of each answer of a pair, [G, 2] number of its tokens)."""
    # Rows 2g and 2g + 1 of a micro-batch are the chosen and the rejected answer of pair g.
    rows = micro.last_token_B.numel()
    sums_B = logps_N.new_zeros(rows).index_add(0, micro.row_ids_N, logps_N)
    return sums_B.view(-1, 2), micro.row_ids_N.bincount(minlength=rows).view(-1, 2)
