"""Loading weights that ZeRO-3 has shared out before they are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from transformers.core_model_loading import Transpose


@contextmanager
def whole_shapes() -> Iterator[None]:
    """Within, transformers compares tensors on disk with whole weights to find out whether they lie transposed there.

    It would compare them with what ZeRO-3 leaves of a weight on a rank, and transpose each: Qwen3-VL's experts, as they
    are saved by transformers 5, would have the wrong shape or, where they are square, be wrong without a word.
    """
    convert: Any = Transpose.convert

    def by_whole_shape(self: Transpose, *tensors: Any, **of: Any) -> Any:
        if self.check_dims:
            weight = of["model"].get_parameter(of["full_layer_name"])
            whole = torch.empty(getattr(weight, "ds_shape", weight.shape), device="meta")
            of["model"] = SimpleNamespace(get_parameter=lambda _: whole)
        return convert(self, *tensors, **of)

    Transpose.convert = by_whole_shape  # type: ignore[method-assign]
    try:
        yield
    finally:
        Transpose.convert = convert  # type: ignore[method-assign]
