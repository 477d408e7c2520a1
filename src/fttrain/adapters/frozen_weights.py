"""Weights of the base for adapters that start from them: whole, in fp32, output rows first."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn


def weight_of(layer: Any) -> Tensor:
    """Return a PEFT layer's frozen weight, dequantized, [out, in] in fp32. Under ZeRO-3 only within `whole`."""
    stored = dequantize_module_weight(layer.get_base_layer()).detach()
    return (stored.T if getattr(layer, "fan_in_fan_out", False) else stored).float()


@contextmanager
def whole(*parameters: nn.Parameter) -> Iterator[None]:
    """Within, parameters that ZeRO-3 has sharded are whole on every rank, for reading. Collective."""
    sharded: list[Any] = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(sharded, modifier_rank=None):
        yield
