"""Select the elements of a task vector to keep, the largest ones or random ones, slice by slice."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

# For each dtype: the integer dtype of the same width, and the shift of its bits in each pass.
PASSES = {torch.float32: (torch.int32, (16, 0)), torch.float64: (torch.int64, (48, 32, 16, 0))}
BINS = 1 << 16


class KthLargest:
    """Find the exact ``k``-th largest magnitude of a tensor without holding the tensor in memory.

    Magnitudes sort like their bits as integers (radix select). Each pass makes a histogram of the next 16 bits of the
    elements that match the bits known so far: two passes for float32, four for float64.
    """

    def __init__(self, k: int, dtype: torch.dtype):
        self._dtype = dtype
        self._integers, self._shifts = PASSES[dtype]
        self.passes = len(self._shifts)
        self._left, self._known = k, 0
        self._counts = np.zeros(BINS, dtype=np.int64)
        self.value = 0.0

    def observe(self, number: int, values: Tensor) -> None:
        """Add a slice in pass ``number``. Overwrites ``values`` with their magnitudes."""
        bits = values.abs_().view(self._integers).numpy()
        shift = self._shifts[number]
        if number:
            bits = bits[bits >> (shift + 16) == self._known]
        self._counts += np.bincount((bits >> shift) & (BINS - 1), minlength=BINS)

    def end_pass(self, number: int) -> None:
        above = np.cumsum(self._counts[::-1])
        place = int(np.searchsorted(above, self._left))  # bins from the top
        self._left -= int(above[place - 1]) if place else 0
        self._known = (self._known << 16) | (BINS - 1 - place)
        self._counts[:] = 0
        if number == self.passes - 1:
            self.value = float(torch.tensor(self._known, dtype=self._integers).view(self._dtype))


def kept_at_random(density: float, seed: int, name: str, model: int, start: int, count: int) -> Tensor:
    """Random mask of the elements to keep among ``start``, ``start + 1``, ... of a tensor: bool [count].

    Each element's random number depends on the seed, the tensor's name, the model's index and the element's position
    (the Philox counter), but not on the slicing. ``start`` must be a multiple of 4.
    """
    digest = hashlib.sha256(f"{seed}/{model}/{name}".encode()).digest()
    # Philox yields four numbers per count. Its raw stream is the same in every version of numpy.
    stream = np.random.Philox(key=int.from_bytes(digest[:16], "little")).advance(start // 4)
    return torch.from_numpy(stream.random_raw(count) < np.uint64(min(int(density * 2.0**64), 2**64 - 1)))
