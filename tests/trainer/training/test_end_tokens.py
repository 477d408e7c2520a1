"""The tokens that end answers in training are those that end generation afterwards."""

import json
from pathlib import Path

import pytest
from tests.trainer.in_process import make_data, make_step, train
from transformers import AutoTokenizer

from ftlaunch.recipe.adapter import Adapter, Full, Lora
from ftlaunch.recipe.stages import Merge
from fttrain.data.templates import LLAMA2, end_tokens
from fttrain.merging.merge import find_source, merge

START, END = 256, 257
TEMPLATE = "{% for message in messages %}{{ message.role + ': ' + message.content + '<|im_start|>\n' }}{% endfor %}"


@pytest.mark.parametrize("adapter", [Lora(rank=2, alpha=4), Full()])
def test_artifact_and_merge_name_the_token_that_ends_answers(adapter: Adapter, tiny_model: Path, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"question": "who", "answer": "a cook"}\n' * 2)
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    data = make_data(tmp_path / "rows.jsonl", template=str(tmp_path / "template.jinja"), train_on="all")
    done = train(make_step(tiny_model, data, adapter=adapter, steps=1, batch_size=2), tmp_path)
    made = [done.artifact]
    if isinstance(adapter, Lora):
        merge(find_source(done.artifact), tmp_path / "merged", Merge())
        made.append(tmp_path / "merged")
    for folder in made:
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [START, END]


def test_only_what_a_template_puts_behind_an_answer_ends_it(tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert end_tokens(tokenizer, tokenizer.chat_template) == {END}
    assert end_tokens(tokenizer, TEMPLATE) == {START, END}
    assert end_tokens(tokenizer, LLAMA2) == {END}
    assert end_tokens(tokenizer, None) == {END}
    assert end_tokens(tokenizer, "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}") == {END}
