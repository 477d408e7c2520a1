"""Scores of answers against plain transformers and PEFT, wherever they come from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tests.trainer.in_process import make_data, make_step, train
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import Full
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.stages import SHIPPED_REWARDS, Ppo, Reward
from ftlaunch.rows.messages import Conversation
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir
from ftlaunch.run.spec import StageSpec
from fttrain import artifact
from fttrain.data.chat import Encoder
from fttrain.data.prompts import Prompt
from fttrain.ppo.rewards import SHIPPED, ModelReward, ScoredResponse, gsm8k


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("She has 3 + 4 = 7 left.\n#### 1,207", 1.0),
        ("1207.0", 1.0),
        ("It is $1,207.", 1.0),
        ("1207 or rather 1208", 0.0),
        ("-1207", 0.0),
        ("I do not know", 0.0),
        ("", 0.0),
    ],
)
def test_gsm8k_compares_the_last_numbers(answer: str, score: float):
    assert gsm8k("How many?", answer, {"answer": "600 * 2 = <<600*2=1200>>1200, and 7 more.\n#### 1207"}) == score


def test_every_shipped_reward_can_be_named():
    assert tuple(SHIPPED) == SHIPPED_REWARDS


@pytest.fixture
def make(tiny_model: Path, rows_file: Path) -> Callable[..., StageSpec]:
    def call(**fields: Any) -> StageSpec:
        settings = {"max_new_tokens": 6, "micro_batch_size": 2, "steps": 2, "ppo_epochs": 2, **fields}
        return make_step(tiny_model, make_data(rows_file, completion=None), kind=Ppo, **settings)

    return call


@pytest.fixture
def prompts(rows_file: Path) -> list[str]:
    return [json.loads(row)["question"] for row in rows_file.read_text().splitlines()]


def scored(stage_dir: StageDir, prompts: list[str]) -> list[tuple[list[dict[str, str]], float]]:
    """The conversations that were scored, and their scores."""
    found = list(read_jsonl(stage_dir.samples))
    assert len(found) == 8
    assert {sample["prompt"] for sample in found} <= set(prompts)
    turns = [
        [{"role": "user", "content": sample["prompt"]}, {"role": "assistant", "content": sample["answer"]}]
        for sample in found
    ]
    return [(conversation, sample["reward"]) for conversation, sample in zip(turns, found, strict=True)]


@torch.no_grad()
def test_a_reward_stage_s_artifact_scores_on_the_policy_s_own_base(
    make: Callable[..., StageSpec], tiny_model: Path, pairs: Data, prompts: list[str], tmp_path: Path
):
    with torch.enable_grad():
        reward = train(make_step(tiny_model, pairs, kind=Reward, steps=4), tmp_path / "run").artifact
        step = train(replace(make(), reward="01-reward/artifact"), tmp_path / "run")
    plain: Any = AutoPeftModelForCausalLM.from_pretrained(reward)
    head = load_file(reward / "head.safetensors")["score.weight"]
    tokenizer = AutoTokenizer.from_pretrained(reward)
    for turns, score in scored(step, prompts):
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
        expected = plain.get_base_model().base_model(ids).last_hidden_state[0, -1] @ head[0]
        assert score == pytest.approx(float(expected), abs=1e-4)
    names = [path.name for path in step.artifact.iterdir()]
    assert "head.safetensors" not in names
    assert not any((step.artifact / name).is_dir() for name in names)


@torch.no_grad()
def test_a_classifier_scores_with_its_own_tokenizer(
    make: Callable[..., StageSpec], tiny_model: Path, prompts: list[str], tmp_path: Path
):
    torch.manual_seed(3)
    config = LlamaConfig.from_pretrained(tiny_model, num_labels=1, pad_token_id=257, tie_word_embeddings=False)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "judge")
    with torch.enable_grad():
        step = train(make(reward_model=str(tmp_path / "judge")), tmp_path)
    judge: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    for (user, assistant), score in scored(step, prompts):
        ids = torch.tensor([tokenizer(user["content"]).input_ids + tokenizer(assistant["content"]).input_ids])
        assert score == pytest.approx(float(judge(ids).logits[0, 0]), abs=1e-4)


def test_what_gives_no_single_score_is_refused(make: Callable[..., StageSpec], tiny_model: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"the model in .* gives 2 numbers for an answer"):
        train(make(reward_model=str(tiny_model)), tmp_path)


def test_a_reward_adapter_on_another_base_is_refused(
    make: Callable[..., StageSpec], tiny_model: Path, pairs: Data, tmp_path: Path
):
    reward = train(make_step(tiny_model, pairs, kind=Reward, steps=1), tmp_path).artifact
    full = replace(make(reward_model=str(reward)), adapter=Full())
    with pytest.raises(UserError, match="which is not what the policy's adapter is on"):
        train(full, tmp_path / "full")


@pytest.mark.parametrize("template", ["none", "chatml"])
def test_a_reward_model_is_asked_as_it_was_trained(template: str, tiny_model: Path, pairs: Data, tmp_path: Path):
    data = replace(pairs, template=template)
    done = train(make_step(tiny_model, data, kind=Reward, steps=1), tmp_path)
    tokenizer = artifact.load_tokenizer(str(done.artifact))
    row = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    ((pair,),) = Encoder(tokenizer, data).encode_pairs([("row", row)])
    prompt = Prompt(np.zeros(1, np.int32), Conversation([{"role": "user", "content": "2+2?"}]), row, "row")
    judge = ModelReward(tokenizer, micro_batch_size=1)
    assert judge._ids(ScoredResponse(prompt, "4")).tolist() == pair.chosen.ids_T
