"""Tiny models of six families over single bytes, made from configs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import _byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": WIDTHS,
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "attn_pdrop": 0,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
    },
    "gemma": WIDTHS | {"head_dim": 8},
    "qwen2": WIDTHS,
    "mistral": WIDTHS,
    "phi": WIDTHS | {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
}


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a family, with weights large enough that an adapter matters."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = _save(name, tmp_path_factory.mktemp("families") / name)
        return made[name]

    return of


def _save(name: str, folder: Path) -> Path:
    tokenizer = _byte_tokenizer()
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(name, vocab_size=len(tokenizer), **FAMILIES[name], **ids)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
