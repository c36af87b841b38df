"""HDF5's Fletcher-32 checksum. Import it where it is needed: numba takes a second to load."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shodh_moe.kernels.compiled import compiled


def fletcher32(data_N: NDArray[np.uint8]) -> int:
    """HDF5's Fletcher-32 checksum."""
    return int(_fletcher32(data_N))


@compiled()
def _fletcher32(data_N: NDArray[np.uint8]) -> int:
    first, second = np.uint64(0), np.uint64(0)
    for i in range(0, data_N.size - 1, 2):
        first += (np.uint64(data_N[i]) << np.uint64(8)) | np.uint64(data_N[i + 1])
        second += first
        if i & 0x1FE == 0x1FE:  # rarely, but before the second sum overflows
            first = (first & np.uint64(0xFFFF)) + (first >> np.uint64(16))
            second = (second & np.uint64(0xFFFF)) + (second >> np.uint64(16))
            second = (second & np.uint64(0xFFFF)) + (second >> np.uint64(16))
    if data_N.size % 2:
        first += np.uint64(data_N[-1]) << np.uint64(8)
        second += first
    for _ in range(4):
        first = (first & np.uint64(0xFFFF)) + (first >> np.uint64(16))
        second = (second & np.uint64(0xFFFF)) + (second >> np.uint64(16))
    return (second << np.uint64(16)) | first
