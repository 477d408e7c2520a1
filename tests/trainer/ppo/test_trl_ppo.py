"""PPO's functions against what TRL 1.12's trainer made of a rollout (trl_ppo.py, which wrote the file, says how)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fttrain.objectives import ppo

TOLD: dict[str, Any] = json.loads(Path(__file__).with_name("trl_ppo.json").read_text())
SETTINGS = TOLD["settings"]


def of(table: dict[str, Any], name: str) -> Tensor:
    return torch.tensor(table[name])


def test_rewards_advantages_and_returns_are_trls():
    rollout = TOLD["rollout"]
    logps, values = of(rollout, "logprobs"), of(rollout, "values")
    mask = torch.ones_like(logps).bool()
    kl = ppo.token_kl(logps, of(rollout, "ref_logprobs"), estimator=SETTINGS["kl_estimator"])
    rewards = ppo.token_rewards(of(rollout, "scores"), kl, mask, coefficient=SETTINGS["kl_coef"])
    advantages, returns = ppo.gae(rewards, values, mask, gamma=SETTINGS["gamma"], lam=SETTINGS["lam"])
    torch.testing.assert_close(returns, of(rollout, "returns"), atol=1e-5, rtol=0)
    whitened = ppo.whiten(advantages.flatten()).view_as(advantages)
    torch.testing.assert_close(whitened, of(rollout, "advantages"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("number", range(len(TOLD["steps"])))
def test_losses_and_gradients_are_trls(number: int):
    step = TOLD["steps"][number]
    logps, values = (of(step, name).requires_grad_() for name in ("new_logprobs", "vpred"))
    policy = ppo.policy_loss(logps, of(step, "mb_logprobs"), of(step, "mb_advantage"), clip=SETTINGS["cliprange"])
    value = ppo.value_loss(values, of(step, "mb_values"), of(step, "mb_return"), clip=SETTINGS["cliprange_value"])
    losses = policy.losses_N.mean(), value.losses_N.mean()
    for loss, name in zip(losses, ("pg_loss", "vf_loss"), strict=True):
        torch.testing.assert_close(loss, of(step, name), atol=1e-5, rtol=1e-6)
    whole = losses[0] + SETTINGS["vf_coef"] * losses[1]
    torch.testing.assert_close(whole, of(step, "loss"), atol=1e-5, rtol=1e-6)
    whole.backward()
    torch.testing.assert_close(logps.grad, of(step, "gradient of new_logprobs"), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.grad, of(step, "gradient of vpred"), atol=1e-5, rtol=0)


def test_the_steps_go_far_enough_to_be_clipped():
    last = TOLD["steps"][-1]
    ratio = (of(last, "new_logprobs") - of(last, "mb_logprobs")).exp()
    assert ((ratio - 1).abs() > SETTINGS["cliprange"]).any()
    assert ((of(last, "vpred") - of(last, "mb_values")).abs() > SETTINGS["cliprange_value"]).any()
