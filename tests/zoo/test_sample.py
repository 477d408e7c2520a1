"""A family for each mechanism that stands between tokens and logits: packed or refused, and right in either case.

`make zoo` tries all of `families.py`, and more of each.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.faults.ranks import Ranks
from tests.zoo import faith
from tests.zoo.families import build
from tests.zoo.trials import Trials

from ftlaunch.errors import UserError
from ftlaunch.plan import family
from ftlaunch.recipe.adapter import Lora
from ftlaunch.recipe.model import Model
from fttrain import adapters
from fttrain.data.token_set import Group
from fttrain.model import packing
from fttrain.model.scorer import load_base

PACKED = [
    *("mistral, window", "llama4", "gemma2", "gpt_oss", "opt", "cohere2", "deepseek_v3", "mixtral", "gemma4"),
    "roberta",
]
"""Windows, chunks, caps, sinks, a body in a body, a scaled head, wide keys, experts, keys of another layer; positions
that count from 2.
"""
VISION = ["gemma3, with vision", "mistral3, with vision", "qwen2_5_vl, with vision"]
"""The text part is of the class itself, of another family, or has positions in three directions."""
PADDED = ["bloom", "falcon, alibi", "qwen3_next", "jamba", "falcon_h1", "lfm2", "recurrent_gemma", "deepseek_v32"]
"""Attention of their own, linear attention, Mamba, multipliers, short convolutions, a capped head, keys by rank."""


FIELDS: dict[str, dict[str, Any]] = {
    "llama4": {"floor_scale": 8, "attn_scale": 0.3, "no_rope_layers": [1, 0, 1, 0]},
    "gemma4": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    | {"num_kv_shared_layers": 2},
}
"""Queries scaled by their positions from so few tokens on as rows have; layers that share keys."""


@pytest.mark.parametrize("name", [*PACKED, *VISION])
def test_packed_rows_and_shared_prompts_are_what_they_are_alone(name: str, tmp_path: Path):
    model, rows, pairs = build(name, tmp_path, **FIELDS.get(name, {})), faith.rows(), faith.pairs()
    assert family.layout(model, 61) is None
    expected = faith.plain(model, rows)
    assert faith.trained(model, [Group((row,)) for row in rows], packing=True).is_same(expected)
    expected = faith.plain(model, [row for group in pairs for row in group.rows])
    assert faith.trained(model, pairs, packing=True, share=True).is_same(expected)


@pytest.mark.parametrize("name", PADDED)
def test_a_model_that_would_mix_rows_refuses_to_pack_them_and_is_right_padded(name: str, tmp_path: Path):
    model, rows = build(name, tmp_path), faith.rows()
    groups = [Group((row,)) for row in rows]
    assert family.layout(model, 61) is not None
    with pytest.raises(UserError, match="cannot be trained on packed rows"):
        faith.trained(model, groups, packing=True)
    assert faith.trained(model, groups, packing=False).is_same(faith.plain(model, rows))


@pytest.mark.parametrize("name", ["zamba", "gpt2"])
def test_a_merged_model_is_the_adapter_model_up_to_rounding(name: str, ranks: Ranks, tmp_path: Path):
    trials = Trials(name, tmp_path, ranks)
    trials.sft()
    trials.merge()


def test_text_that_no_fused_attention_computes_is_computed_within_a_class_that_has_one(tmp_path: Path):
    folder = build("llava of gemma2, with vision", tmp_path)
    model: Any = load_base(Model(path=str(folder), dtype="fp32"), dtype=torch.float32, packing=True)
    with packing.by_itself(model):
        assert model(input_ids=torch.arange(9)[None]).logits.isfinite().all()


def test_an_adapter_on_weights_that_the_model_would_halve_for_evaluation_says_what_it_says_in_training(tmp_path: Path):
    folder = build("rwkv", tmp_path, rescale_every=1)
    base = load_base(Model(path=str(folder), dtype="fp32"), dtype=torch.float32, packing=False)
    model: Any = adapters.attach(base, Lora(rank=4, alpha=8, dropout=0.0), None, in_fp32=True)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    in_training, evaluated = (model.train(mode)(torch.arange(9)[None]).logits for mode in (True, False))
    torch.testing.assert_close(evaluated, in_training, atol=1e-4, rtol=0)


def test_rows_that_stretch_positions_are_computed_one_by_one(tmp_path: Path) -> None:
    model, rows = build("phi3, long rope", tmp_path), faith.rows()
    groups = [Group((row,)) for row in rows]
    with pytest.raises(UserError, match="longer than 32 tokens"):
        faith.trained(model, groups, packing=True)
    assert faith.trained(model, groups, packing=False).is_same(faith.plain(model, rows))


def test_no_row_is_turned_by_the_length_of_one_before_it(tmp_path: Path) -> None:
    turned = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = build("llama", tmp_path, rope_parameters=turned, max_position_embeddings=32)
    row, _, longer, _ = faith.rows()
    by_themselves = [faith.plain(model, [one]).logps_N for one in (longer, row)]
    found = faith.trained(model, [Group((longer,)), Group((row,))], packing=False, alone=True).logps_N
    torch.testing.assert_close(found, torch.cat(by_themselves), atol=faith.LOGPS, rtol=0)
