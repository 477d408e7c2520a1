"""Rows that a model cannot read are told with the numbers before the first step."""

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from tests.trainer.in_process import make_data, make_step, train
from tests.zoo.families import build
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import Prompt
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.stages import Dpo, Ppo
from fttrain.model import limits


@pytest.fixture
def rows(tmp_path: Path) -> Data:
    """Short rows, and the tenth of 100 letters."""
    told = [{"question": "what", "answer": "x" * (100 if number == 10 else 5)} for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    return make_data(tmp_path / "rows.jsonl", template="none")


@pytest.mark.parametrize(
    ("family", "fields", "positions"),
    [
        ("gpt2", {"n_positions": 64}, 64),
        ("opt", {"max_position_embeddings": 64}, 64),
        ("gptj", {"n_positions": 64}, 64),
        ("mpt", {"max_seq_len": 64}, 64),
        ("llama", {"max_position_embeddings": 64}, None),
        ("bloom", {}, None),
        ("gemma3, with vision", {}, None),
    ],
)
def test_only_tables_of_positions_limit_rows(
    family: str, fields: dict[str, Any], positions: int | None, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(build(family, tmp_path, **fields))
    assert limits.of(model).positions == positions
    assert limits.of(model).vocabulary == 320


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_longer_than_the_table_of_positions_is_refused_before_the_first_step(
    streaming: bool, rows: Data, tmp_path: Path
) -> None:
    model = build("gpt2", tmp_path / "model", n_positions=64)
    data = replace(rows, streaming=streaming, max_length=512)
    with pytest.raises(UserError, match=r"a row has \d+ tokens, and the model has a table of 64 positions") as told:
        train(make_step(model, data, steps=1), tmp_path)
    assert "set max_length = 64" in told.value.remedy
    train(make_step(model, replace(data, max_length=64), steps=3), tmp_path / "cut")
    with pytest.raises(UserError, match="after 8 virtual ones"):
        train(
            make_step(model, replace(data, max_length=64), adapter=Prompt(virtual_tokens=8), packing=False, steps=1),
            tmp_path / "virtual",
        )


def test_an_answer_that_would_outgrow_the_table_is_refused_before_the_first_rollout(rows: Data, tmp_path: Path) -> None:
    model = build("gpt2", tmp_path / "model", n_positions=64)
    (tmp_path / "rewards.py").write_text("def early(prompt, answer, row):\n    return 0.0\n")
    sizes: dict[str, Any] = {"rollout_size": 4, "batch_size": 4, "max_new_tokens": 62}
    step = make_step(
        model, replace(rows, completion=None), kind=Ppo, reward_function=f"{tmp_path}/rewards.py:early", **sizes
    )
    with pytest.raises(UserError, match=r"rows.jsonl:1, with max_new_tokens: a row has \d+ tokens"):
        train(step, tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_token_that_the_embedding_has_no_row_for_is_refused_by_name(
    streaming: bool, rows: Data, tmp_path: Path
) -> None:
    model = build("llama", tmp_path / "model", vocab_size=258)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<tool-{number}>" for number in range(70)])
    tokenizer.save_pretrained(model)
    train(make_step(model, replace(rows, streaming=streaming), steps=1), tmp_path / "without")  # no row has one
    lines = Path(rows.path).read_text().splitlines()
    lines[2] = json.dumps({"question": "what", "answer": "call <tool-3> now"})
    Path(rows.path).write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"a row has token \d+ \('<tool-3>'\), and the model knows tokens below 258"):
        train(make_step(model, replace(rows, streaming=streaming), steps=4), tmp_path)


def test_both_answers_of_a_pair_are_looked_at(tmp_path: Path) -> None:
    pair = {"prompt": "what", "chosen": "x", "rejected": "y" * 100}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n" + json.dumps({**pair, "rejected": "z"}) + "\n")
    data = Data(path=str(tmp_path / "pairs.jsonl"), format="preference", template="none")
    model = build("gpt2", tmp_path / "model", n_positions=64)
    with pytest.raises(UserError, match="a table of 64 positions"):
        train(make_step(model, data, kind=Dpo, steps=1, batch_size=2), tmp_path)
