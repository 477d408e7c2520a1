"""The reward model: trained, resumed and handed on with its head."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from msgspec.structs import replace
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from tests.trainer.in_process import make_step, train
from tests.zoo.families import build
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import Full, Lora
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.stages import Merge, Reward
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir
from fttrain.distributed.stop_request import StoppedEarly
from fttrain.merging.merge import find_source, merge
from fttrain.model import classifier
from fttrain.tools import chat


def lines(stage_dir: StageDir, key: str) -> list[dict[str, Any]]:
    return [line for line in read_jsonl(stage_dir.metrics) if key in line]


def reward_by_hand(body: Any, head: torch.Tensor, tokenizer: Any, turns: list[dict[str, str]]) -> torch.Tensor:
    ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
    return body(ids).last_hidden_state[0, -1].float() @ head[0]


def turns(pair: dict[str, str], key: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[key]}]


def test_it_learns_which_answer_is_better(tiny_model: Path, pairs: Data, tmp_path: Path) -> None:
    data = replace(pairs, test=6)
    done = train(make_step(tiny_model, data, kind=Reward, steps=30, evaluate_every=10), tmp_path)
    trained, evaluated = lines(done, "loss"), lines(done, "eval/loss")
    assert trained[0]["loss"] == pytest.approx(0.69, abs=0.1)
    assert trained[-1]["loss"] < 0.1
    assert evaluated[-1]["eval/rewards/accuracy"] == 1.0
    assert evaluated[-1]["eval/rewards/margin"] > 2
    assert 0 <= evaluated[-1]["eval/rewards/calibration_error"] < 0.2
    assert trained[-1]["rewards/margin"] == pytest.approx(
        trained[-1]["rewards/chosen"] - trained[-1]["rewards/rejected"]
    )


def test_its_first_step_is_the_formula_s(
    tiny_model: Path, pairs: Data, pair_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    step = make_step(tiny_model, pairs, kind=Reward, steps=1, batch_size=24, centering=0.1, margin=0.5)
    done = train(step, tmp_path)
    start = make_step(tiny_model, pairs, kind=Reward, steps=1, batch_size=24, learning_rate=1e-30)
    head = load_file(train(start, tmp_path / "still").artifact / "head.safetensors")["score.weight"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    losses = []
    with torch.no_grad():
        for pair in pair_rows:
            chosen, rejected = (
                reward_by_hand(model.base_model, head, tokenizer, turns(pair, key)) for key in ("chosen", "rejected")
            )
            losses.append(-F.logsigmoid(chosen - rejected - 0.5) + 0.1 * (chosen + rejected) ** 2)
    assert not lines(done, "eval/loss")  # no pair is held out
    assert lines(done, "loss")[0]["loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)


@pytest.mark.parametrize("layout", [{"share_prompt": False}, {"packing": False, "share_prompt": False}])
def test_the_layout_changes_nothing(layout: dict[str, bool], tiny_model: Path, pairs: Data, tmp_path: Path) -> None:
    shared, plain = (
        train(make_step(tiny_model, pairs, kind=Reward, steps=3, **fields), tmp_path / name)
        for name, fields in (("shared", {}), ("plain", layout))
    )
    for ours, theirs in zip(lines(shared, "loss"), lines(plain, "loss"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["tokens"] == theirs["tokens"]


def test_an_adapter_on_the_embedding_trains(tiny_model: Path, pairs: Data, tmp_path: Path) -> None:
    adapter = Lora(targets=["embed_tokens", "q_proj"], rank=2, alpha=4)
    done = train(make_step(tiny_model, pairs, kind=Reward, steps=2, adapter=adapter), tmp_path)
    assert [line["step"] for line in lines(done, "loss")] == [1, 2]


def test_a_stopped_stage_goes_on_as_if_it_had_not_been(tiny_model: Path, pairs: Data, tmp_path: Path) -> None:
    step = make_step(tiny_model, pairs, kind=Reward, save_every=100)
    calm = train(step, tmp_path / "calm")
    with pytest.raises(StoppedEarly):
        train(step, tmp_path / "stopped", stop_after=3)
    resumed = train(step, tmp_path / "stopped")
    assert [line["loss"] for line in lines(resumed, "loss")] == [line["loss"] for line in lines(calm, "loss")]
    for name in ("head.safetensors", "adapter_model.safetensors"):
        ours, theirs = load_file(resumed.artifact / name), load_file(calm.artifact / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_second_reward_stage_goes_on_with_the_head(tiny_model: Path, pairs: Data, tmp_path: Path) -> None:
    first = train(make_step(tiny_model, pairs, kind=Reward), tmp_path)
    still = make_step(tiny_model, pairs, kind=Reward, start="01-reward/artifact", learning_rate=1e-30, steps=1)
    second = train(still, tmp_path)
    ours, theirs = (load_file(step.artifact / "head.safetensors")["score.weight"] for step in (second, first))
    assert torch.equal(ours, theirs)
    assert lines(second, "loss")[0]["rewards/margin"] > lines(first, "loss")[0]["rewards/margin"]


def test_trained_in_full_it_is_a_sequence_classifier(
    tiny_model: Path, pairs: Data, pair_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    step = make_step(tiny_model, pairs, kind=Reward, adapter=Full(), learning_rate=1e-3, steps=20)
    done = train(step, tmp_path)
    assert json.loads((done.artifact / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]
    model, info = AutoModelForSequenceClassification.from_pretrained(done.artifact, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(done.artifact)
    texts = [
        tokenizer.apply_chat_template(turns(pair, key), tokenize=False)
        for pair in pair_rows
        for key in ("chosen", "rejected")
    ]
    with torch.no_grad():
        batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        rewards = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
        alone = [model(torch.tensor([tokenizer(text).input_ids])).logits[0, 0] for text in texts[:4]]
    assert torch.allclose(rewards[:4], torch.stack(alone), atol=1e-5)
    differences = rewards[0::2] - rewards[1::2]
    assert (differences > 0).float().mean() > 0.9


def test_merged_it_is_a_sequence_classifier_with_the_adapter_model_s_rewards(
    tiny_model: Path, pairs: Data, pair_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    done = train(make_step(tiny_model, pairs, kind=Reward), tmp_path)
    merged = merge(find_source(done.artifact), tmp_path / "model", Merge())
    assert merged.of == "rewards"
    assert merged.kl < 1e-9
    assert merged.max_logit_difference < 1e-5
    rater, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    adapted = AutoPeftModelForCausalLM.from_pretrained(done.artifact).get_base_model().base_model
    head = load_file(done.artifact / "head.safetensors")["score.weight"]
    with torch.no_grad():
        for pair in pair_rows[:3]:
            text = tokenizer.apply_chat_template(turns(pair, "chosen"), tokenize=False)
            batch = tokenizer([text, text + " and more"], padding=True, return_tensors="pt")
            expected = reward_by_hand(adapted, head, tokenizer, turns(pair, "chosen"))
            assert rater(**batch).logits[0, 0].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_merge_that_lost_its_head_is_noticed(
    tiny_model: Path, pairs: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = train(make_step(tiny_model, pairs, kind=Reward), tmp_path)
    other = load_file(done.artifact / "head.safetensors")["score.weight"].flip(1).contiguous()
    make = classifier.make

    def mistaken(folder: Path, tokenizer: Any) -> None:
        save_file({"score.weight": other}, folder / "head.safetensors")
        make(folder, tokenizer)

    monkeypatch.setattr(classifier, "make", mistaken)
    with pytest.raises(UserError, match="the merged model differs"):
        merge(find_source(done.artifact), tmp_path / "model", Merge())


def test_it_is_not_to_be_talked_with(tiny_model: Path, pairs: Data, tmp_path: Path) -> None:
    done = train(make_step(tiny_model, pairs, kind=Reward, steps=1), tmp_path)
    with pytest.raises(UserError, match="is a reward model: it rates answers"):
        chat.load(str(done.artifact))


def test_what_no_classifier_can_be_made_of_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="transformers has no sequence classifier on a nonesuch model"):
        classifier.architecture("nonesuch")
    with pytest.raises(UserError, match="BertForSequenceClassification does not classify by the last token alone"):
        classifier.architecture("bert")
    assert classifier.architecture("gpt2") == "GPT2ForSequenceClassification"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }}<|im_start|>{% endfor %}"
    with pytest.raises(UserError, match="no special token except the one that ends answers"):
        classifier.padding(tokenizer, tokenizer.chat_template)  # <|im_end|> is EOS, and <|im_start|> ends answers here


def test_a_tokenizer_without_a_token_for_padding_is_refused_before_anything_is_trained(
    pairs: Data, tmp_path: Path
) -> None:
    model = build("gpt2", tmp_path / "model")
    alphabet = {chr(byte) if 32 < byte < 127 else f"<{byte}>": byte for byte in range(256)}
    bare = Tokenizer(BPE(vocab={**alphabet, "<|endoftext|>": 256}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|endoftext|>").save_pretrained(model)
    step = make_step(model, replace(pairs, template="none"), kind=Reward, adapter=Full(), steps=2)
    with pytest.raises(UserError, match="no special token except the one that ends answers"):
        train(step, tmp_path)
    assert not (tmp_path / "01-reward" / "metrics.jsonl").exists()
