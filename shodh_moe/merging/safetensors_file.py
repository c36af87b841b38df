"""Read and write headers of safetensors files; the library maps whole files and cannot write a file in parts.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the header's length, a JSON header with
dtype, shape and byte range of every tensor, then their data. It has no complex128: such a tensor is stored as float64
[..., 2] (real, imaginary) and named in the entry ``complex128`` of ``__metadata__``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

CODES = {
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TYPES = {code: dtype for dtype, code in CODES.items()}
LARGEST_HEADER = 100_000_000  # bytes; the library's own limit
COMPLEX128 = "complex128"


class Damaged(Exception):
    """A damaged file; the message names the file and the problem."""


def read_header(file: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """Dtype, shape and byte offset of every tensor, in the order of the file.

    Raises:
        Damaged: the file is not a safetensors file, is truncated, or is longer than its header says.
        OSError: the file cannot be read.
    """
    size = file.stat().st_size
    with open(file, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise Damaged(f"{file} is truncated, or not a safetensors file")
        try:
            header = json.loads(raw.read(length))
            metadata = header.pop("__metadata__", None)
            metadata = {} if metadata is None else metadata
            if not all(isinstance(text, str) for text in metadata.values()):
                raise Damaged(f"{file} is damaged: its __metadata__ does not consist of texts")
            paired = _paired(metadata)
            # Empty tensors begin where the next one does.
            found = sorted((*entry["data_offsets"], name, entry) for name, entry in header.items())
            tensors, end = {}, 0
            for first, last, name, entry in found:
                code, shape = entry["dtype"], tuple(entry["shape"])
                if code not in TYPES:
                    raise Damaged(f"{file}: tensor {name} has dtype {code}, which cannot be merged")
                dtype = TYPES[code]
                if any(type(number) is not int for number in (first, last, *shape)):
                    raise TypeError
                if first != end or last - first != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
                    raise Damaged(f"{file} is damaged: the header's entry of tensor {name} is wrong")
                end = last
                if name in paired and dtype == torch.float64 and shape[-1:] == (2,):
                    dtype, shape = torch.complex128, shape[:-1]
                tensors[name] = (dtype, shape, 8 + length + first)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
            raise Damaged(f"{file} is damaged: its header cannot be read") from None
    if size != 8 + length + end:
        problem = "truncated" if size < 8 + length + end else "longer than its header says"
        raise Damaged(f"{file} is {problem}: it has {size} bytes instead of {8 + length + end}")
    return tensors


def _paired(metadata: dict[str, str]) -> list[Any]:
    """Names of the tensors that are complex128, from a file's metadata; other programs may write any text there."""
    try:
        names = json.loads(metadata.get(COMPLEX128, "[]"))
    except (ValueError, RecursionError):
        return []
    return names if isinstance(names, list) else []


def make_header(
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """The start of a file with ``tensors`` in this order, the byte offset of each tensor, and the file's size."""
    header: dict[str, object] = {}
    paired = [name for name, (dtype, _) in tensors.items() if dtype == torch.complex128]
    header["__metadata__"] = {**metadata, **({COMPLEX128: json.dumps(paired)} if paired else {})}
    first, places = 0, {}
    for name, (dtype, shape) in tensors.items():
        end = first + math.prod(shape) * dtype.itemsize
        code, stored = ("F64", [*shape, 2]) if dtype == torch.complex128 else (CODES[dtype], [*shape])
        header[name] = {"dtype": code, "shape": stored, "data_offsets": [first, end]}
        places[name], first = first, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the widest type is aligned
    beginning = len(text).to_bytes(8, "little") + text
    return beginning, {name: len(beginning) + place for name, place in places.items()}, len(beginning) + first
