"""One rank's shard as the very bytes of its safetensors file, in memory that another process can read."""

import json
import math
import mmap
import os
from collections.abc import Mapping

import torch
from torch import Tensor

NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's names of number formats, the wide ones first: in this order every tensor lies aligned.

Source: the layout that safetensors documents: header length (8 bytes, little-endian), JSON header, tensors end to end.
"""
ORDER = {dtype: place for place, dtype in enumerate(NAMES)}
ALIGNMENT = 8

Layout = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]


class SharedShard:
    """A copy of tensors that stays as it is while training changes them.

    The memory is kept from one save to the next, so filling it again is nothing but copying.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("ftlaunch-checkpoint")
        """Descriptor of the memory, for the process that writes it to a file."""
        self.size = 0
        """Bytes of the file."""
        self._layout: Layout = ()
        self._metadata: dict[str, str] = {}
        self._views: dict[str, Tensor] = {}

    def fill(self, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        """Copy the tensors in, and the metadata into the header."""
        layout = tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
        if layout != self._layout or metadata != self._metadata:
            self._lay_out(layout, metadata)
        for name, tensor in tensors.items():
            self._views[name].copy_(tensor)

    def _lay_out(self, layout: Layout, metadata: dict[str, str]) -> None:
        header: dict[str, object] = {"__metadata__": metadata}
        ends = {}
        end = 0
        for name, dtype, shape in sorted(layout, key=lambda item: (ORDER[item[1]], item[0])):
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
            ends[name] = start
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % ALIGNMENT)  # JSON allows spaces at its end; tensors then begin aligned
        begin = ALIGNMENT + len(text)
        self._views = {}  # they keep the old mapping alive
        self.size = begin + end
        os.ftruncate(self.descriptor, self.size)
        memory = mmap.mmap(self.descriptor, self.size)
        memory[:begin] = len(text).to_bytes(ALIGNMENT, "little") + text
        self._views = {
            name: torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=begin + ends[name]).view(shape)
            for name, dtype, shape in layout
        }
        self._layout, self._metadata = layout, metadata
