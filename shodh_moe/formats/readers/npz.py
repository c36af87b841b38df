"""NumPy's .npz: every array, by its name."""

from __future__ import annotations

import zipfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shodh_moe.formats.arrays import Array, ArrayFile, Part, require_numbers

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    (3, 0): np.lib.format.read_array_header_2_0,  # differs only in names of fields, of which numbers have none
}


def read(path: Path, stack: ExitStack) -> ArrayFile:
    """List the arrays; of one whose first axis is time, one snapshot at a time is read."""
    archive = stack.enter_context(zipfile.ZipFile(path))
    members = {name[:-4]: name for name in archive.namelist() if name.endswith(".npy")}

    def array(name: str) -> Array:
        stream = stack.enter_context(archive.open(members[name]))
        while stream.read(2**16):  # at its end zipfile compares the checksum, which reading in parts does not
            pass
        stream.seek(0)
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(f"version {version[0]}.{version[1]} of the npy format is unknown")
        shape, fortran, dtype = _HEADERS[version](stream)
        require_numbers(path, name, dtype)
        start = stream.tell()

        def raw(part: Part) -> Any:
            # Read single entries of the first axes if possible: an array may be larger than memory.
            count, first, inner = int(np.prod(shape)), 0, shape
            while part and isinstance(part[0], int) and not fortran:
                count //= max(inner[0], 1)
                first, inner, part = first + part[0] * count * dtype.itemsize, inner[1:], part[1:]
            if fortran:
                inner = shape[::-1]
            stream.seek(start + first)
            block = stream.read(count * dtype.itemsize)
            if len(block) != count * dtype.itemsize:
                raise EOFError("it ends too early")
            values = np.frombuffer(block, dtype).reshape(inner)
            return (values.T if fortran else values)[part]

        return Array(path, name, tuple(shape), raw)

    return ArrayFile(path, {name: partial(array, name) for name in members})
