"""Mixers with a state of their own that keep packed rows apart, as their kernels are told where rows begin.

transformers takes such kernels from the packages causal-conv1d, mamba-ssm and flash-linear-attention where they are
installed, and hands them the keywords of a model's `forward`. Its substitutes in torch take no borders.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fttrain.data.segments import Segments
from fttrain.model.attention import Unpackable

KERNELS = {
    "causal_conv1d_fn": "seq_idx",
    "mamba_chunk_scan_combined": "seq_idx",
    "mamba_split_conv1d_scan_combined": "seq_idx",
    "chunk_gated_delta_rule": "cu_seqlens",
    "chunk_kda": "cu_seqlens",
}
"""Kernels of whole rows that take borders, and by which keyword. Those of the first Mamba are not among them."""
SINGLE = {"causal_conv1d_update", "selective_state_update", "fused_recurrent_gated_delta_rule", "fused_recurrent_kda"}
"""Kernels of a single token after a cache, which training never calls."""
PACKAGES = {"causal_conv1d": "causal-conv1d", "mamba_ssm": "mamba-ssm", "fla": "flash-linear-attention"}


@dataclass(frozen=True, eq=False)
class Mixer:
    """A module that calls kernels of this sort, or transformers' substitutes of them."""

    name: str
    module: nn.Module
    keywords: frozenset[str]
    """Arguments by which its `forward` takes borders."""
    lack: str | None
    """Why it does not keep rows apart; None where it does."""


@dataclass(frozen=True)
class Packed:
    """What holds of every pass over packed rows of one model."""

    mixers: list[Mixer]
    attending: int
    """Calls of packed attention that it makes, at least."""


def mixers(causal: nn.Module) -> list[Mixer]:
    """Return the modules of a model that call kernels of this sort."""
    return [mixer for name, module in causal.named_modules() if (mixer := _mixer(name, module)) is not None]


def told(mixers: list[Mixer], segments: Segments) -> dict[str, Tensor]:
    """Return the borders of a line's rows by the keywords that the mixers take. Raises Unpackable for prefixes."""
    if not mixers:
        return {}
    if segments.has_prefixes:
        raise Unpackable("carries a state from token to token, so that no prompt can be shared")
    lengths = torch.tensor(segments.lengths, device=segments.device)
    rows = torch.arange(len(lengths), dtype=torch.int32, device=segments.device)
    index_1T = rows.repeat_interleave(lengths)[None]
    bounds = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    wanted = frozenset().union(*(mixer.keywords for mixer in mixers))
    return {keyword: index_1T if keyword == "seq_idx" else bounds for keyword in wanted}


@contextmanager
def required(mixers: list[Mixer]) -> Iterator[None]:
    """Within, a mixer that does not get its borders raises Unpackable."""

    def guard(mixer: Mixer) -> Any:
        def check(module: nn.Module, _: Any, given: dict[str, Any]) -> None:
            if any(given.get(keyword) is None for keyword in mixer.keywords):
                raise Unpackable(f"does not hand the borders of rows to {type(module).__name__}")

        return mixer.module.register_forward_pre_hook(check, with_kwargs=True)

    with ExitStack() as hooks:
        for mixer in mixers:
            hooks.callback(guard(mixer).remove)
        yield


@contextmanager
def as_in_training(mixers: list[Mixer]) -> Iterator[None]:
    """Within, mixers call the kernels of training in evaluation, too; the modules in them stay as they are."""
    modes = [mixer.module.training for mixer in mixers]
    try:
        for mixer in mixers:
            mixer.module.training = True
        yield
    finally:
        for mixer, mode in zip(mixers, modes, strict=True):
            mixer.module.training = mode


def attends(module: nn.Module) -> bool:
    """Return whether a module's `forward` calls the attention that is registered with transformers."""
    return (forward := _forward(module)) is not None and "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def _forward(module: nn.Module) -> FunctionType | None:
    """Return the code of a module's class; None where it is not in Python."""
    forward: Any = inspect.unwrap(type(module).forward)
    return forward if isinstance(forward, FunctionType) else None


def _mixer(name: str, module: nn.Module) -> Mixer | None:
    if (forward := _forward(module)) is None:
        return None
    code = forward.__code__
    called = [forward.__globals__.get(one) for one in code.co_names]
    # transformers wraps a kernel or its substitute in a closure that says which of them it calls.
    held = [inspect.getclosurevars(one).nonlocals for one in called if isinstance(one, FunctionType)]
    kernels = [one for one in held if "is_new_implementation" in one and one["func_name"] not in SINGLE]
    if not kernels:
        return None
    if any(one["func_name"] not in KERNELS for one in kernels):
        return Mixer(name, module, frozenset(), "its kernels take no borders of rows")
    keywords = frozenset(KERNELS[one["func_name"]] for one in kernels)
    # Most mixers call the bounds as FlashAttention does, and rename them for their kernel.
    if "cu_seq_lens_q" in code.co_consts:
        keywords = keywords - {"cu_seqlens"} | {"cu_seq_lens_q"}
    lacks = sorted({PACKAGES[one["package"]] for one in kernels if not _takes_borders(one)})
    return Mixer(name, module, keywords, f"without {' and '.join(lacks)} nothing keeps rows apart" if lacks else None)


def _takes_borders(kernel: Mapping[str, Any]) -> bool:
    return kernel["is_new_implementation"] and KERNELS[kernel["func_name"]] in kernel["applicable_params"]
