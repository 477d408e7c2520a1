"""A tokenizer small enough to be trained here: byte-level BPE that gives every text back as it was."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["user assistant system Blue is the sky. What colour is the sky? Paris, the capital of France. Be brief. Two."]

STABLE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe a tiny model.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""In the manner of SmolLM2: a system turn of its own where there is none, and a line end after each turn."""

TokenizerMaker = Callable[..., Any]


def train_backend(*, adds_bos: bool) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 20, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


@pytest.fixture(scope="session")
def make_tokenizer() -> TokenizerMaker:
    """`make_tokenizer(chat_template=…, adds_bos=…, **special tokens)`; pad is EOS, as in many a real model."""

    def make(*, chat_template: str | None = STABLE, adds_bos: bool = False, **special: str | None) -> Any:
        names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", **special}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_backend(adds_bos=adds_bos), **names)
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: TokenizerMaker) -> Any:
    return make_tokenizer()


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[Iterable[Any]], str]:
    """Writes rows.jsonl and gives its path."""

    def write(rows: Iterable[Any]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
