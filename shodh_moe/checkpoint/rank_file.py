"""One rank's file: fragments are copied to host memory, then written and hashed in one pass.

The format is safetensors. It is written here because the library would need a second pass over the file to hash it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Order of tensors in the file: wide types first, so that each tensor starts at a multiple of its element size.
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
BLOCK = 4 << 20  # bytes written and hashed at a time


class HostCopy:
    """Copies of 1-D tensors in one reusable buffer of host memory, laid out as in a safetensors file."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._header = b""
        self._bytes = 0

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> None:
        """Copy ``tensors``, which replaces the previous copies; the originals may change as soon as this returns.

        Raises:
            ValueError: a tensor is not 1-D, or its dtype is not in `DTYPES`.
        """
        for key, tensor in tensors.items():
            if tensor.dim() != 1 or tensor.dtype not in DTYPES:
                raise ValueError(f"{key} has {tensor.dim()} axes and type {tensor.dtype}: cannot be stored")
        order = list(DTYPES)
        items = sorted(tensors.items(), key=lambda item: order.index(item[1].dtype))
        self._bytes = sum(tensor.nbytes for _, tensor in items)
        if len(self._buffer) < self._bytes:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # free the old buffer before allocating the new one
            # Not pinned: torch rounds pinned memory up to a power of two, which may exceed the host's memory.
            self._buffer = torch.empty(self._bytes, dtype=torch.uint8)
        header, first = {}, 0
        for key, tensor in items:
            end = first + tensor.nbytes
            self._buffer[first:end].view(tensor.dtype).copy_(tensor)
            header[key] = {"dtype": DTYPES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [first, end]}
            first = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text

    def write(self, path: Path) -> dict[str, Any]:
        """Write and sync the file; return its ``bytes`` and ``sha256``. Other threads can run meanwhile.

        Raises:
            OSError: the file cannot be written.
        """
        digest = hashlib.sha256(self._header)
        data = self._buffer.numpy().data[: self._bytes]
        with open(path, "wb") as file:
            file.write(self._header)
            for first in range(0, self._bytes, BLOCK):
                block = data[first : first + BLOCK]
                file.write(block)
                digest.update(block)
            file.flush()
            os.fsync(file.fileno())
        return {"bytes": len(self._header) + self._bytes, "sha256": digest.hexdigest()}
