"""MATLAB's .mat up to version 7, by scipy; version 7.3 is HDF5, and its axes are in reverse order there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from scipy.io import loadmat, whosmat

from shodh_moe.formats.arrays import Array, ArrayFile, require_numbers

_NO_ARRAYS = ("struct", "cell", "object", "function", "opaque", "char", "sparse")


def read(path: Path, stack: ExitStack) -> ArrayFile:
    """List the variables; each is loaded as a whole when it is first read."""
    kinds = {name: kind for name, _, kind in whosmat(str(path))}
    unusable = {name: f"a MATLAB {kind}: save the arrays in it as variables" for name, kind in kinds.items()}
    names = [name for name, kind in kinds.items() if kind not in _NO_ARRAYS]

    def array(name: str) -> Array:
        values = loadmat(str(path), variable_names=[name])[name]
        require_numbers(path, name, values.dtype)
        # MATLAB has no arrays with fewer than two axes: a list of numbers is a row or a column.
        if values.ndim == 2 and 1 in values.shape:
            values = np.ravel(values)
        return Array(path, name, tuple(values.shape), lambda part: values[part])

    arrays: dict[str, Callable[[], Array]] = {name: partial(array, name) for name in names}
    unusable = {name: what for name, what in unusable.items() if name not in arrays}
    return ArrayFile(path, arrays, unusable=unusable, in_memory=True)
