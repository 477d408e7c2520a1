"""A quantized model on disk: integers of exactly so many bits in packed.safetensors, and what says how to read them.

`packed.json` holds, for every quantized matrix, its bits, shape and whether it is symmetric. In the file stand its
codes (least significant bit first, [G, N] in reading order, counted from the lowest integer), scales in fp32, zeros as
bytes where there are any, and weights that stayed floats with their rows and columns. All other weights are as they
are.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fttrain.quant.grid import Grid, Steps
from fttrain.quant.weights import Quantized

FILE = "packed.safetensors"
CARD = "packed.json"


def dtype_of(folder: Path) -> torch.dtype:
    """The number format that a model folder's config names for its weights."""
    config = json.loads((folder / "config.json").read_text())
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")


def pack(codes: Tensor, grid: Grid) -> Tensor:
    """Return codes of any shape as bytes, `grid.bits` bits each; the last byte is filled up with zeros."""
    # Each code becomes a line of 8 bits, least significant first, of which the first `bits` are kept; end to end they
    # make one stream, so 3-bit codes cross bytes and 8 of them take 3 bytes.
    values = (codes.flatten().to(torch.int64) - grid.lowest).numpy().astype(np.uint8)
    bits = np.unpackbits(values[:, None], axis=1, bitorder="little")[:, : grid.bits]
    return torch.from_numpy(np.packbits(bits.reshape(-1), bitorder="little"))


def unpack(packed: Tensor, grid: Grid, count: int) -> Tensor:
    """Return [count] codes in int16: the inverse of `pack`."""
    bits = np.unpackbits(packed.numpy(), bitorder="little", count=count * grid.bits).reshape(count, grid.bits)
    values = np.packbits(bits, axis=1, bitorder="little")[:, 0]
    return torch.from_numpy(values.astype(np.int16)) + grid.lowest


def save(folder: Path, matrices: dict[str, Quantized], rest: dict[str, Tensor], transposed: set[str]) -> None:
    """Write both files; keys are the names that the weights have in the model."""
    tensors = {key: tensor.contiguous() for key, tensor in rest.items()}
    card: dict[str, Any] = {}
    for key, one in matrices.items():
        tensors[f"{key}.codes"] = pack(one.codes, one.grid)
        tensors[f"{key}.scale"] = one.at.scale.contiguous()
        if not one.grid.symmetric:
            tensors[f"{key}.zero"] = one.at.zero.to(torch.uint8)
        if one.kept is not None:
            tensors[f"{key}.kept"] = one.kept
            tensors[f"{key}.kept_at"] = torch.tensor(one.kept_at, dtype=torch.int32)
        card[key] = {
            "bits": one.grid.bits,
            "symmetric": one.grid.symmetric,
            "shape": one.shape,
            "transposed": key in transposed,
        }
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    (folder / CARD).write_text(json.dumps({"format": 1, "matrices": card}, indent=2))


def load(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return all weights of the model by name, the quantized ones dequantized and rounded to `dtype`."""
    tensors = load_file(folder / FILE)
    card = json.loads((folder / CARD).read_text())["matrices"]
    state: dict[str, Tensor] = {}
    for key, entry in card.items():
        weight = _matrix(tensors, key, entry).dequantized().to(dtype)
        state[key] = (weight.T if entry["transposed"] else weight).contiguous()
    return state | tensors  # `_matrix` has taken out all parts of matrices, so only whole weights are left


def _matrix(tensors: dict[str, Tensor], key: str, entry: dict[str, Any]) -> Quantized:
    """Return one matrix, and take its parts out of `tensors`."""
    grid, shape = Grid(entry["bits"], entry["symmetric"]), tuple(entry["shape"])
    scale = tensors.pop(f"{key}.scale")
    zero = torch.zeros_like(scale) if grid.symmetric else tensors.pop(f"{key}.zero").float()
    codes = unpack(tensors.pop(f"{key}.codes"), grid, shape[0] * shape[1]).reshape(len(scale), -1)
    kept = tensors.pop(f"{key}.kept", None)
    at = tensors.pop(f"{key}.kept_at").tolist() if kept is not None else []
    return Quantized(codes, Steps(scale, zero), grid, shape, tuple((row, column) for row, column in at), kept)
