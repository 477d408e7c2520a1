"""Weights that ZeRO-3 has shared out before they are loaded."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.core_model_loading import Transpose

from fttrain.model.sharded import whole_shapes


@pytest.mark.parametrize("on_disk", [(4, 32, 64), (4, 64, 32)])
def test_a_tensor_is_transposed_only_if_it_does_not_have_the_shape_of_the_whole_weight(on_disk: tuple[int, ...]):
    weight = SimpleNamespace(shape=torch.Size([0]), ds_shape=torch.Size([4, 64, 32]))
    model: Any = SimpleNamespace(get_parameter=lambda _: weight)
    with whole_shapes():
        turn = Transpose(1, 2, check_dims=True).convert
        made = turn({"down": torch.empty(on_disk)}, ["down"], ["down"], model=model, full_layer_name="down")
    assert made["down"].shape == weight.ds_shape
