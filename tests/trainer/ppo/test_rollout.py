"""Rollouts against transformers' own forward, one answer after the other and without a cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tests.trainer.in_process import ALONE, make_data, make_step, start_afresh
from tests.zoo.families import build
from transformers import AutoModelForCausalLM

from ftlaunch.errors import UserError
from fttrain.engine import Engine
from fttrain.model.scorer import load_base
from fttrain.ppo import rollout
from fttrain.ppo.actor import ActorCritic
from fttrain.ppo.rollout import Response, Sampling, draw, roll_out, rounds

TEMPERATURE = 0.8
LENGTHS = [3, 17, 9, 9, 4, 12, 1]


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    make = np.random.default_rng(3)
    return [make.integers(0, 256, size=length, dtype=np.int32) for length in LENGTHS]


def sampler(model: Path, rows: Path, **asked: Any) -> Engine:
    step = make_step(model, make_data(rows))
    start_afresh()
    engine = Engine(step, ALONE)
    base = load_base(step.model, dtype=torch.float32, packing=True)
    engine.prepare(ActorCritic(base, temperature=TEMPERATURE), torch.optim.SGD(base.parameters()))
    engine.verdict = asked
    return engine


@pytest.fixture(scope="module")
def engine(tiny_model: Path, rows_file: Path) -> Engine:
    return sampler(tiny_model, rows_file)


@pytest.fixture(scope="module")
def sample(engine: Engine, prompts: list[np.ndarray]) -> Callable[..., list[Response]]:
    def call(**fields: Any) -> list[Response]:
        stops = frozenset(range(0, 256, 16))  # a fair chance to end at any token
        sampling = Sampling(**{"max_new_tokens": 20, "batch_size": 3, "stop_ids": stops, "seed": (7, 1), **fields})
        return roll_out(engine, engine.scorer, prompts, sampling)  # type: ignore[arg-type]

    return call


def by_hand(model: Any, prompt: np.ndarray, seed: list[int], stops: frozenset[int]) -> tuple[list[int], list[float]]:
    """The whole text through the model for every token; the cumulated probabilities searched one by one."""
    ids, logps = [], []
    for uniform in np.random.Generator(np.random.PCG64(seed)).random(20):
        logits = model(torch.tensor([[*prompt.tolist(), *ids]])).logits[0, -1]
        probabilities = (logits / TEMPERATURE).double().softmax(-1)
        total, token = 0.0, 0
        while (total := total + float(probabilities[token])) <= uniform:
            token += 1
        ids.append(token)
        logps.append(float(probabilities[token].log()))
        if token in stops:
            break
    return ids, logps


@torch.no_grad()
def test_answers_are_those_of_a_plain_loop(tiny_model: Path, prompts: list[np.ndarray], sample: Callable):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    stops = frozenset(range(0, 256, 16))
    answers = sample()
    assert {answer.ended for answer in answers} == {True, False}
    assert len({len(answer.ids_T) for answer in answers}) > 2
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids, logps = by_hand(model, prompt, [7, 1, row], stops)
        assert answer.ids_T.tolist() == ids
        np.testing.assert_allclose(answer.logps_T, logps, atol=1e-4)
        assert answer.ended == (ids[-1] in stops)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "qwen3_5", "jamba", "lfm2"])
def test_windows_and_states_have_the_cache_that_they_need(name: str, rows_file: Path, tmp_path: Path):
    """Prompts are shorter and longer than the window, padded on the left in one batch; answers that end leave it."""
    folder, stops = build(name, tmp_path / "model"), frozenset(range(0, 256, 8))
    engine = sampler(folder, rows_file)
    prompts = [np.random.default_rng(5).integers(0, 256, size=size, dtype=np.int32) for size in (30, 3, 17, 9)]
    sampling = Sampling(max_new_tokens=20, batch_size=4, stop_ids=stops, seed=(7, 1))
    answers = roll_out(engine, cast("ActorCritic", engine.scorer), prompts, sampling)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids, logps = by_hand(model, prompt, [7, 1, row], stops)
        assert answer.ids_T.tolist() == ids
        np.testing.assert_allclose(answer.logps_T, logps, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("granitemoehybrid", {"layer_types": ["mamba", "mamba"]}, "fails to answer with a cache .ValueError: "),
        ("deepseek_v32", {}, "must compute each row by itself, and answers are drawn side by side"),
        ("openai-gpt", {}, "keeps no cache that its answers could be drawn with side by side"),
        ("recurrent_gemma", {}, "answers a prompt otherwise if that is padded on the left"),
    ],
)
def test_a_model_that_cannot_answer_side_by_side_is_refused(
    name: str, fields: dict[str, Any], why: str, rows_file: Path, tmp_path: Path
):
    engine = sampler(build(name, tmp_path / "model", **fields), rows_file, bound=2e-4)
    with pytest.raises(UserError, match=f"PPO cannot train a .* model: it {why}"):
        rollout.refuse_what_cannot_answer(engine, cast("ActorCritic", engine.scorer))


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_answers_do_not_depend_on_what_they_are_generated_beside(batch_size: int, sample: Callable):
    for answer, other in zip(sample(), sample(batch_size=batch_size), strict=True):
        assert answer.ids_T.tolist() == other.ids_T.tolist()
        np.testing.assert_allclose(answer.logps_T, other.logps_T, atol=1e-5)


def test_a_rank_without_prompts_keeps_its_peers_company(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    forward = engine.forward
    monkeypatch.setattr(engine, "forward", lambda decode: asked.append(1) or forward(decode))
    monkeypatch.setattr(rollout, "_goes_on", lambda *_, **__: len(asked) < 4)
    with engine.evaluating(), engine.scorer.generating():  # type: ignore[attr-defined]
        sampling = Sampling(max_new_tokens=9, batch_size=3, stop_ids=frozenset({0}), seed=(7, 1))
        assert rollout._generate(engine, [], [], sampling) == []
    assert len(asked) == 4


def test_another_seed_draws_other_answers(sample: Callable):
    same = [a.ids_T.tolist() == b.ids_T.tolist() for a, b in zip(sample(), sample(seed=(7, 2)), strict=True)]
    assert sum(same) <= 1


def test_rounds_give_every_row_once_to_prompts_of_like_length():
    found = rounds(LENGTHS, 2, 2)
    assert [[len(rows) for rows in batch] for batch in found] == [[2, 2], [2, 1]]
    assert sorted(row for batch in found for rows in batch for row in rows) == list(range(7))
    assert found[0] == [[1, 2], [5, 3]]
    assert rounds([5], 4, 2) == [[[0], []]]


def test_a_token_is_drawn_as_often_as_it_is_probable():
    logps = torch.tensor([0.1, 0.0, 0.6, 0.3]).log()
    uniform = (torch.arange(1000) + 0.5).double() / 1000
    tokens = draw(logps.expand(1000, 4), uniform)
    assert torch.bincount(tokens, minlength=4).tolist() == [100, 0, 600, 300]
    assert draw(logps[None], torch.tensor([0.0]).double()).tolist() == [0]
