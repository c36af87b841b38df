"""NumPy's .npy: one array, which has the name of the file without .npy."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from shodh_moe.formats.arrays import Array, ArrayFile, require_numbers


def read(path: Path, stack: ExitStack) -> ArrayFile:
    """Map the array into memory; only what is read of it is loaded."""
    values = np.load(path, mmap_mode="r", allow_pickle=False)

    def array() -> Array:
        require_numbers(path, path.stem, values.dtype)
        return Array(path, path.stem, tuple(values.shape), lambda part: values[part])

    return ArrayFile(path, {path.stem: array})
