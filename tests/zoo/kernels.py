"""Kernels of convolutions, Mamba-2 and the delta rule that take borders of rows, in plain torch.

They have the names, keywords and shapes of the packages causal-conv1d, mamba-ssm and flash-linear-attention. Within
`installed`, transformers calls them as it calls the packages.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """x [B, D, T], weight [D, W], seq_idx [B, T] → [B, D, T]."""
    width, out = weight.shape[-1], torch.zeros_like(x)
    for back in range(width):
        shifted = F.pad(x, (back, 0))[..., : x.shape[-1]]
        if seq_idx is not None:
            before = F.pad(seq_idx, (back, 0), value=-1)[:, : x.shape[-1]]
            shifted = shifted * (before == seq_idx)[:, None]
        out = out + shifted * weight[:, width - 1 - back, None]
    out = out if bias is None else out + bias[:, None]
    return F.silu(out) if activation else out


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,  # noqa: ARG001
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:
    """x [B, T, H, P], dt [B, T, H], A [H], B and C [B, T, G, N] → [B, T, H, P]."""
    assert z is None
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    B, C = (one.repeat_interleave(x.shape[2] // one.shape[2], 2) for one in (B, C))
    state, out = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]), []
    for t in range(x.shape[1]):
        if t and seq_idx is not None:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        grown = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = state * (dt[:, t] * A).exp()[..., None, None] + grown
        out.append((state * C[:, t, :, None]).sum(-1))
    y = torch.stack(out, 1)
    return y if D is None else y + x * D[:, None]


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int = 0,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """Convolution, scan, gated norm and output projection in one: [B, T, 2·H·P + 2·G·N + H] → [B, T, width]."""
    assert not norm_before_gate
    heads = len(D)
    inner = heads * headdim
    z, xbc, dt = zxbcdt.split([inner, conv1d_weight.shape[0], heads], -1)
    xbc = causal_conv1d_fn(xbc.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation).transpose(1, 2)
    states = (conv1d_weight.shape[0] - inner) // 2
    x, b, c = xbc.split([inner, states, states], -1)
    b, c = (one.unflatten(-1, (ngroups, -1)) for one in (b, c))
    x = x.unflatten(-1, (heads, headdim))
    y = mamba_chunk_scan_combined(x, dt, A, b, c, chunk_size, D, None, dt_bias, seq_idx, True, dt_limit).flatten(2)
    y = y * F.silu(z)
    if rmsnorm_weight is not None:
        grouped = y.unflatten(-1, (ngroups, -1))
        y = (grouped * (grouped.square().mean(-1, keepdim=True) + rmsnorm_eps).rsqrt()).flatten(-2) * rmsnorm_weight
    return y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    """q and k [B, T, H, K], v [B, T, HV, V], beta [B, T, HV], g the same or with K channels → [B, T, HV, V]."""
    starts = set() if cu_seqlens is None else set(cu_seqlens.tolist())
    if use_qk_l2norm_in_kernel:
        q, k = (one * (one.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for one in (q, k))
    q, k = (one.repeat_interleave(v.shape[2] // one.shape[2], 2) for one in (q, k))
    g = g[..., None] if g.dim() == 3 else g
    state, out = q.new_zeros(q.shape[0], *v.shape[2:3], q.shape[-1], v.shape[-1]), []
    for t in range(q.shape[1]):
        state = state * 0 if t in starts else state * g[:, t, ..., None].exp()
        missed = v[:, t] - (state * k[:, t, ..., None]).sum(-2)
        state = state + k[:, t, ..., None] * (beta[:, t, :, None] * missed)[..., None, :]
        out.append((state * q[:, t, ..., None]).sum(-2) * q.shape[-1] ** -0.5)
    return torch.stack(out, 1), None


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    """The same with a gate for each channel of the keys."""
    return chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel, cu_seqlens)


PACKAGES: dict[str, list[Any]] = {
    "causal_conv1d": [causal_conv1d_fn],
    "mamba_ssm": [mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined],
    "fla": [chunk_gated_delta_rule, chunk_kda],
}


@contextmanager
def installed(modeling: ModuleType, packages: set[str]) -> Iterator[None]:
    """Within, a family's module has these kernels, as if the packages had been there when it was imported."""
    from transformers.integrations import use_kernel_func_from_hub_with_fallback as wrap

    known = {kernel.__name__: (package, kernel) for package in packages for kernel in PACKAGES[package]}
    held, modules = vars(modeling).copy(), sys.modules.copy()
    for package in packages:
        sys.modules[package] = ModuleType(package)
        vars(sys.modules[package]).update({kernel.__name__: kernel for kernel in PACKAGES[package]})
    try:
        for name, function in held.items():
            if isinstance(function, FunctionType) and hasattr(function, "__wrapped__"):
                cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
                called = cells["func_name"].cell_contents if "func_name" in cells else None
                if called in known:
                    setattr(modeling, name, wrap(called, known[called][0])(function.__wrapped__))
        yield
    finally:
        vars(modeling).update(held)
        for package in packages:
            sys.modules.pop(package) if package not in modules else sys.modules.update({package: modules[package]})
