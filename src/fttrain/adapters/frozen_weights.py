"""Weights of the base, as those adapters read them that are made from them: whole, in fp32, output rows first."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn


def weight_of(layer: Any) -> Tensor:
    """[out, in] in fp32: what a PEFT layer's frozen weight stands for. Under ZeRO-3 within `whole`."""
    stored = dequantize_module_weight(layer.get_base_layer()).detach()
    return (stored.T if getattr(layer, "fan_in_fan_out", False) else stored).float()


@contextmanager
def whole(*parameters: nn.Parameter) -> Iterator[None]:
    """Within, parameters that ZeRO-3 has left as shards are whole on every rank, to be read. Collective."""
    sharded: list[Any] = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(sharded, modifier_rank=None):
        yield
