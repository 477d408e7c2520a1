"""Tokenizers are those of their tokenizer.json, whatever class a config names."""

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fttrain.model import tokenizer


def write(folder: Path, kind: str) -> Tokenizer:
    """A tokenizer that takes digits one by one and knows compatible characters, in a folder that names a class."""
    vocabulary = {letter: index for index, letter in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "12"])}
    core = Tokenizer(models.BPE(vocabulary, [("1", "2")]))
    core.normalizer = normalizers.NFKC()
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>"])
    core.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": kind, "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return core


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_ids_are_those_of_the_file(kind: str, tmp_path: Path) -> None:
    core = write(tmp_path, kind)
    loaded = tokenizer.load(str(tmp_path))
    for text in ("12 ﬁ", "a 1234", "x<|endoftext|>y"):
        assert loaded(text, add_special_tokens=False).input_ids == core.encode(text).ids
    assert loaded.eos_token == "<|endoftext|>"
    loaded.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert saved["normalizer"] == {"type": "NFKC"}
    assert tokenizer.load(str(tmp_path / "saved"))("12 ﬁ").input_ids == core.encode("12 ﬁ").ids
