"""Answers to what is held out: which prompts and references there are, how answers are made, and what they score."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import peft
import pytest
import torch
from tests.trainer.tools.test_tools import greedy
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftlaunch.errors import UserError
from ftlaunch.load import load_recipe
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.tools import EvaluateOptions
from fttrain.answering.generation import Decoding, reply
from fttrain.data.tokens import tokenize
from fttrain.evaluation.prompts import data_of, held_out_prompts
from fttrain.tools import evaluate
from fttrain.tools.output import answer

ROWS = [
    ("red", "kettle"),
    ("red", "pan"),
    ("blue", "lamp"),
    ("green", "salt"),
    ("red", "pot"),
    ("blue", "light"),
    ("green", "leaf"),
]


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Recipe:
    """Seven rows over three prompts, one of them held out."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"ask": ask, "say": say}) + "\n" for ask, say in ROWS))
    path = tmp_path / "rows.toml"
    path.write_text(
        f'name = "rows"\n[model]\npath = "{tiny_model}"\n[data.rows]\npath = "{rows}"\nprompt = "{{ask}}"\n'
        'completion = "{say}"\ntest = 1\n[[stage]]\nkind = "sft"\ndata = "rows"\nsteps = 1\n'
    )
    return load_recipe(path, []).recipe


def test_a_prompt_is_asked_once_and_all_its_rows_are_references(recipe: Recipe, tmp_path: Path, tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    _, data = data_of(recipe, None)
    (held_out,) = held_out_prompts(tokenize(data, tokenizer, recipe.seed, tmp_path / "tokens"), tokenizer)
    asked = next(ask for ask, _ in ROWS if ask in held_out.prompt)
    assert sorted(held_out.references) == sorted(say for ask, say in ROWS if ask == asked)
    assert held_out.is_trained
    assert tokenizer.decode(held_out.ids_T) == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"

    whole = msgspec.structs.replace(data, test=0)
    every = held_out_prompts(tokenize(whole, tokenizer, recipe.seed, tmp_path / "tokens"), tokenizer)
    assert [one.references for one in every] == [["kettle", "pan", "pot"], ["lamp", "light"], ["salt", "leaf"]]
    assert not any(one.is_trained for one in every)


ADAPTERS = {
    "none": None,
    "lora": peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def in_order(parts: Iterable[dict[int, str]]) -> list[str]:
    every = {place: text for part in parts for place, text in part.items()}
    return [every[place] for place in range(len(every))]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_answers_side_by_side_are_those_one_by_one(kind: str, tiny_model: Path):
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    if (adapter := ADAPTERS[kind]) is not None:
        model = peft.get_peft_model(model, adapter)
    prompts = [tuple(tokenizer.encode(text)) for text in ("red", "a long question about lamps", "salt and", "red x")]
    ends = frozenset({tokenizer.eos_token_id})
    together = in_order(reply(model.eval(), tokenizer, prompts, ends, Decoding(8, batch_size=3)))
    expected = [tokenizer.decode(greedy(model, list(prompt), 8)[len(prompt) :]).strip() for prompt in prompts]
    assert together == expected
    assert len(set(together)) > 1


def test_an_answer_ends_at_the_first_token_that_ends_one(tiny_model: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt = tuple(tokenizer.encode("red"))
    free = greedy(model.eval(), list(prompt), 6)[len(prompt) :]
    (answer,) = in_order(reply(model, tokenizer, [prompt], frozenset({free[3]}), Decoding(6)))
    assert answer == tokenizer.decode(free[: free.index(free[3])]).strip()


def test_models_are_set_side_by_side(
    recipe: Recipe,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    answers = tmp_path / "answers.jsonl"
    options = EvaluateOptions(recipe=recipe, models=[str(tiny_model), str(tiny_model)], max_new_tokens=4)
    assert answer(evaluate.main, msgspec.structs.replace(options, answers=str(answers))) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("rows: 1 prompt held out, ")
    head = next(place for place, line in enumerate(said) if line.startswith("model"))
    assert said[head].split() == ["model", "bleu", "nist", "rouge_l", "words"]
    assert said[head + 1] == said[head + 2]
    assert "+0.00 [+0.00, +0.00]   no difference that these prompts could show" in said[-1]
    (line,) = map(json.loads, answers.read_text().splitlines())
    assert list(line) == ["prompt", "references", "answers", "scores"]

    assert answer(evaluate.main, msgspec.structs.replace(options, json=True)) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["models"][str(tiny_model)].keys() == {"bleu", "nist", "rouge_l", "words"}


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        ({}, "others", "--data others is no data set of prompts and answers"),
        ({"format": "text", "text_field": "say"}, None, "the recipe has 0 data sets of prompts and answers"),
        ({"completion": None, "format": "prompt"}, None, "the rows of rows have no answer to compare with"),
        ({"train_on": "all"}, None, "only a last answer of rows read at once"),
    ],
)
def test_data_that_answers_cannot_be_compared_with(recipe: Recipe, change: dict[str, Any], name: str, message: str):
    changed = msgspec.structs.replace(recipe.data["rows"], **change)
    with pytest.raises(UserError, match=message):
        data_of(msgspec.structs.replace(recipe, data={"rows": changed}), name)
