"""NetCDF 3, by scipy."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import netcdf_file

from shodh_moe.formats.arrays import READ_ATTRIBUTES, Array, ArrayFile, Part, plain, require_numbers
from shodh_moe.formats.packed_values import ATTRIBUTES, packing


def read(path: Path, stack: ExitStack) -> ArrayFile:
    """List the variables; the file is mapped into memory, and only what is read of it is loaded."""
    file = stack.enter_context(netcdf_file(path, "r", mmap=True))

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
