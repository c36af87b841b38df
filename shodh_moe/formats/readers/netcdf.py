"""NetCDF 3, by scipy."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import netcdf_file

from shodh_moe.formats.arrays import READ_ATTRIBUTES, Array, ArrayFile, Part, plain, require_numbers
from shodh_moe.formats.packed_values import ATTRIBUTES, packing


class _CheckedFile(netcdf_file):
    """A file whose variables have to follow each other, which scipy does not check, but NetCDF's library does."""

    def _read_var(self) -> Any:
        found = super()._read_var()
        shape, dtype, begin = found[2], np.dtype(found[6]), found[7]
        per_record = bool(shape) and shape[0] is None
        size = -(-int(np.prod(shape[per_record:])) * dtype.itemsize // 4) * 4
        self.__dict__.setdefault("places", []).append((per_record, begin, size))
        self.__dict__["header_end"] = self.fp.tell()
        return found

    def require_order(self) -> None:
        """Raise `ValueError` if values of two variables overlap, or are in another order than the variables."""
        end = self.__dict__.get("header_end", 0)
        # Variables without an axis of records are stored first.
        for _, begin, size in sorted(self.__dict__.get("places", []), key=itemgetter(0)):
            if begin < end:
                raise ValueError("the places of its variables overlap")
            end = begin + size


def read(path: Path, stack: ExitStack) -> ArrayFile:
    """List the variables; the file is mapped into memory, and only what is read of it is loaded."""
    file = stack.enter_context(_CheckedFile(path, "r", mmap=True))
    file.require_order()

    def array(name: str) -> Array:
        variable = file.variables[name]
        require_numbers(path, name, variable.data.dtype)
        attributes = {key: getattr(variable, key) for key in ATTRIBUTES if hasattr(variable, key)}
        packed = packing(f"{path}: {name}", attributes, variable.data.dtype, netcdf=True)

        # Look the variable up each time: holding a mapped array would keep the file open.
        def raw(part: Part) -> Any:
            return np.array(file.variables[name].data[part])

        about = (
            plain({key: getattr(variable, key) for key in READ_ATTRIBUTES if hasattr(variable, key)}),
            tuple(variable.dimensions),
        )
        return Array(path, name, tuple(variable.data.shape), raw, packed, *about)

    return ArrayFile(path, {name: partial(array, name) for name in file.variables})
