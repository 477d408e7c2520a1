"""Answers to what is held out: which prompts and references there are, how answers are made, and what they score."""

import csv
import json
from pathlib import Path
from typing import Any

import msgspec
import peft
import pytest
import torch
from tests.trainer.tools.test_tools import greedy
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftlaunch.errors import BAD_INPUT, UserError
from ftlaunch.load import load_recipe
from ftlaunch.recipe import Recipe
from fttrain.data.tokens import tokenize
from fttrain.evaluation.prompts import asked_of, data_of
from fttrain.evaluation.text_metrics import score
from fttrain.tools import evaluate

E2E = Path(__file__).parents[4] / "shared" / "data" / "e2e_dev.csv"
ANSWERS = [
    "The Lantern is a cheap Thai place by the harbour.",
    "The old mill serves breakfast, and children are welcome there.",
    "Nobody eats at the Crown any more: the Crown is empty",
]
REFERENCES = [
    [
        "The Lantern is a Thai place near the harbour, and it is cheap.",
        "By the harbour, the Lantern sells cheap Thai food.",
    ],
    ["The Old Mill serves breakfast; children are welcome."],
    ["At the Crown nobody eats any more, they say.", "Nobody eats at the Crown now.", "The Crown is empty."],
]


def test_with_one_reference_nist_is_that_of_nltk():
    found = score(ANSWERS, [references[:1] for references in REFERENCES])
    assert found.nist == pytest.approx(3.7614468869211146)  # nltk 3.10.4, corpus_nist


def test_scores_with_several_are_those_of_the_e2e_challenge():
    found = score(ANSWERS, REFERENCES)
    told = (47.156632089063606, 4.707946293668453)  # by e2e-metrics, measure_scores.py -p
    assert (found.bleu, found.nist) == pytest.approx(told)


def test_people_score_each_other_as_the_e2e_challenges_scorer_has_it():
    if not E2E.exists():
        pytest.skip(f"{E2E} is not there")
    references: dict[str, list[str]] = {}
    with E2E.open() as file:
        for row in csv.DictReader(file):
            references.setdefault(row["mr"], []).append(row["ref"])
    people = [texts[0] for texts in references.values()]
    others = [texts[1:] for texts in references.values()]
    found, paired = score(people, others), score(people, [texts[:1] for texts in others])
    assert (len(people), sum(map(len, others))) == (547, 4125)
    assert (found.bleu, found.nist) == pytest.approx((59.95345944253415, 8.578516297666646))
    assert (paired.bleu, paired.nist) == pytest.approx((28.4918002687153, 4.84153676385676))


def test_rouge_l_takes_the_best_precision_and_the_best_recall_of_any_reference():
    found = score(["a b c d"], [["a x c d e f g h", "b c"]])
    precision, recall, weight = 3 / 4, 2 / 2, 1.2**2  # "a c d" of the answer; "b c" of the second reference
    assert found.rouge_l == pytest.approx(100 * (1 + weight) * precision * recall / (recall + weight * precision))
    assert score(["x"], [["a b"]]).rouge_l == 0


def test_an_empty_answer_scores_nothing():
    found = score(["", "a"], [["a b"], ["b"]])
    assert (found.bleu, found.nist, found.rouge_l) == (0, 0, 0)


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
    (held_out,) = asked_of(tokenize(data, tokenizer, recipe.seed, tmp_path / "tokens"), tokenizer)
    asked = next(ask for ask, _ in ROWS if ask in held_out.prompt)
    assert sorted(held_out.references) == sorted(say for ask, say in ROWS if ask == asked)
    assert held_out.is_trained
    assert tokenizer.decode(held_out.ids_T) == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"

    whole = msgspec.structs.replace(data, test=0)
    every = asked_of(tokenize(whole, tokenizer, recipe.seed, tmp_path / "tokens"), tokenizer)
    assert [one.references for one in every] == [["kettle", "pan", "pot"], ["lamp", "light"], ["salt", "leaf"]]
    assert not any(one.is_trained for one in every)


ADAPTERS = {
    "none": None,
    "lora": peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_answers_side_by_side_are_those_one_by_one(kind: str, tiny_model: Path):
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    if (adapter := ADAPTERS[kind]) is not None:
        model = peft.get_peft_model(model, adapter)
    prompts = [tuple(tokenizer.encode(text)) for text in ("red", "a long question about lamps", "salt and", "red x")]
    together = evaluate.reply(model.eval(), tokenizer, prompts, frozenset({tokenizer.eos_token_id}), 8)
    expected = [tokenizer.decode(greedy(model, list(prompt), 8)[len(prompt) :]).strip() for prompt in prompts]
    assert together == expected
    assert len(set(together)) > 1


def test_an_answer_ends_at_the_first_token_that_ends_one(tiny_model: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt = tuple(tokenizer.encode("red"))
    free = greedy(model.eval(), list(prompt), 6)[len(prompt) :]
    (answer,) = evaluate.reply(model, tokenizer, [prompt], frozenset({free[3]}), 6)
    assert answer == tokenizer.decode(free[: free.index(free[3])]).strip()


def test_models_are_set_side_by_side(
    recipe: Recipe,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    resolved = tmp_path / "resolved.json"
    resolved.write_bytes(msgspec.json.encode(recipe))
    answers = tmp_path / "answers.jsonl"
    call = [str(resolved), str(tiny_model), str(tiny_model), "--max-new-tokens", "4"]
    assert evaluate.main([*call, "--answers", str(answers)]) == 0
    head, *_ = said = capsys.readouterr().out.splitlines()
    assert head.startswith("rows: 1 prompt held out, ")
    assert said[-1] == said[-2]
    assert said[-3].split() == ["model", "BLEU", "NIST", "ROUGE-L", "words"]
    (line,) = map(json.loads, answers.read_text().splitlines())
    assert list(line) == ["prompt", "references", "answers"]

    assert evaluate.main([*call, "--json"]) == 0
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


def test_a_file_that_is_no_recipe_is_a_users_mistake(tmp_path: Path, tiny_model: Path):
    (tmp_path / "none.json").write_text("{}")
    assert evaluate.main([str(tmp_path / "none.json"), str(tiny_model)]) == BAD_INPUT
