"""Weights that ZeRO-3 has shared out before they are loaded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.core_model_loading import Transpose
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from ftlaunch.errors import UserError
from ftlaunch.recipe.model import Model
from fttrain.model.scorer import load_base
from fttrain.model.sharded import whole_shapes


@pytest.mark.parametrize("on_disk", [(4, 32, 64), (4, 64, 32)])
def test_a_tensor_is_transposed_only_if_it_does_not_have_the_shape_of_the_whole_weight(on_disk: tuple[int, ...]):
    weight = SimpleNamespace(shape=torch.Size([0]), ds_shape=torch.Size([4, 64, 32]))
    model: Any = SimpleNamespace(get_parameter=lambda _: weight)
    with whole_shapes():
        turn: Any = Transpose(1, 2, check_dims=True).convert
        made = turn({"down": torch.empty(on_disk)}, ["down"], ["down"], model=model, full_layer_name="down")
    assert made["down"].shape == weight.ds_shape


def test_a_model_that_cannot_be_loaded_in_shares_is_said_to_load_in_one_process_perhaps(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    shared_out = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        with pytest.raises(UserError, match="no model could be loaded from") as refused:
            load_base(Model(path=str(tmp_path)), dtype=torch.float32, packing=True)
    finally:
        unset_hf_deepspeed_config()
    assert shared_out.is_zero3()
    assert refused.value.remedy.endswith('; if it loads in one process, write strategy = "zero2"')
