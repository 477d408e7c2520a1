"""What a rollout is worth, worked by hand."""

from typing import Any

import numpy as np
import pytest
import torch

from ftlaunch.recipe.stages import Ppo
from fttrain.objectives.ppo import Moments
from fttrain.ppo.experience import Experience, Scored, make_experience
from fttrain.ppo.rollout import Response

PROMPTS = [np.array([1, 2, 3], dtype=np.int32), np.array([4], dtype=np.int32)]
ANSWERS = [
    Response(np.array([5, 6], dtype=np.int32), np.array([-1.0, -2.0], dtype=np.float32), ended=True),
    Response(np.array([7, 8, 9], dtype=np.int32), np.array([-1.0, -1.0, -1.0], dtype=np.float32), ended=False),
]
SCORED = Scored(
    logps_BT=torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]]),
    values_BT=torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.5]]),
    reference_logps_BT=torch.tensor([[-1.5, -2.0, 0.0], [-1.0, -2.0, -1.0]]),
)


def make(**fields: Any) -> Experience:
    stage = Ppo(data="x", **{"gamma": 1.0, "gae_lambda": 1.0, "whiten_advantages": False, **fields})
    scores = torch.tensor([2.0, 1.0])
    moments = Moments().with_more(torch.tensor([2.0, 1.0, 3.0, 2.0]))
    return make_experience(stage, PROMPTS, ANSWERS, SCORED, scores, kl_coefficient=0.1, moments=moments)


def test_kl_is_paid_at_its_token_and_the_score_comes_last():
    made = make()
    # rewards: [-0.05, 2] and [0, -0.1, 1]; with γ = λ = 1 the returns are what is still to come
    torch.testing.assert_close(made.returns_BT, torch.tensor([[1.95, 2.0, 0.0], [0.9, 0.9, 1.0]]))
    torch.testing.assert_close(made.advantages_BT, torch.tensor([[1.45, 1.5, 0.0], [0.9, 0.65, 0.5]]))
    torch.testing.assert_close(made.kl_B, torch.tensor([0.5, 1.0]))
    assert made.measures()["reward"] == 1.5
    assert made.measures()["answers_ended"] == 0.5
    assert made.measures()["answer_tokens"] == 2.5
    assert made.mismatch == 0


def test_an_answer_that_did_not_end_pays_for_it():
    assert make(missing_eos_penalty=0.3).returns_BT[:, 0].tolist() == pytest.approx([1.95, 0.6])
    assert make(missing_eos_penalty=0.3).scores_B.tolist() == [2.0, 1.0]  # as the reward gave them


def test_scores_are_brought_to_the_running_mean_and_deviation():
    deviation = np.std([2, 1, 3, 2], ddof=1)
    expected = [-0.05, -0.1 - 1 / deviation]
    assert make(score_scaling="running").returns_BT[:, 0].tolist() == pytest.approx(expected)


def test_rewards_are_scaled_within_the_rollout_and_keep_their_mean():
    rewards = np.array([-0.05, 2.0, 0.0, -0.1, 1.0])
    scaled = (rewards - rewards.mean()) / rewards.std(ddof=1) + rewards.mean()
    expected = [scaled[:2].sum(), scaled[2:].sum()]
    assert make(score_scaling="batch").returns_BT[:, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_advantages_are_whitened_over_all_tokens():
    plain, whitened = make(), make(whiten_advantages=True)
    mask = plain.mask_BT
    values = plain.advantages_BT[mask]
    torch.testing.assert_close(whitened.advantages_BT[mask], (values - values.mean()) / values.std())
    assert not whitened.advantages_BT[~mask].any()
    torch.testing.assert_close(whitened.returns_BT, plain.returns_BT)


def test_a_row_is_prompt_and_answer_with_the_answer_trained():
    made = make()
    ids, trained = made.row(0)
    assert ids.tolist() == [1, 2, 3, 5, 6]
    assert trained.tolist() == [False, False, False, True, True]
    assert made.row(1)[0].tolist() == [4, 7, 8, 9]
