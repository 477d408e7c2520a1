"""Tiny models of six families over single bytes, made from configs, and adapters trained on them for three steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tests.conftest import _byte_tokenizer
from tests.trainer import in_process
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ftlaunch.recipe.adapter import Adapter
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.stages import Sft
from fttrain import artifact
from fttrain.artifact import StartPoint
from fttrain.data.batches import MicroBatch, collate
from fttrain.data.token_set import Group
from fttrain.model.scorer import Scorer
from fttrain.stages.sft import CrossEntropy
from fttrain.training import session
from fttrain.training.loop import _take

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


IDS = torch.arange(40)[None] + 40


def base_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


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


class Trained(NamedTuple):
    """An adapter after three steps."""

    artifact: Path
    logits: torch.Tensor
    """Of the very model that was trained."""
    losses: list[float]
    scorer: Scorer


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Trained]:
    """Trains an adapter by the trainer's own engine on one batch of random rows, and saves it."""

    def train(model: Path, adapter: Adapter, **stage: Any) -> Trained:
        step = in_process.make_step(model, Data(path="rows"), adapter=adapter, **stage)
        in_process.start_afresh()
        source = StartPoint(step.model, None, str(model))
        assert isinstance(step.stage, Sft)
        engine = session.build(step, step.stage, in_process.ALONE, source, lambda wrapped, _: Scorer(wrapped))
        micros, objective = [some_rows(packing=step.stage.packing)], CrossEntropy()
        engine.set_learning_rate(1e-2)
        losses = [_take(objective, engine, micros, objective.weight(micros[0])).loss for _ in range(3)]
        wrapped: Any = engine.scorer.model
        wrapped.get_base_model().set_attn_implementation("sdpa")
        expected = logits(wrapped)
        artifact.save(step, source, engine, AutoTokenizer.from_pretrained(model), tmp_path / "artifact")
        return Trained(tmp_path / "artifact", expected, losses, engine.scorer)

    return train


def rows_of_ids() -> list[torch.Tensor]:
    """Three rows of token ids, of which all but the first four are trained."""
    draw = np.random.default_rng(0)
    return [torch.from_numpy(draw.integers(0, 250, size=length)) for length in (9, 14, 30)]


def some_rows(*, packing: bool) -> MicroBatch:
    """The same as a micro-batch."""
    rows = [(ids.numpy().astype(np.int32), np.arange(len(ids)) > 3) for ids in rows_of_ids()]
    return collate([Group((row,)) for row in rows], packing=packing, chunks=1, device=torch.device("cpu"))
