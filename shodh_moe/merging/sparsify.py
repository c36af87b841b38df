"""Which elements of a task vector stay: the largest ones, or some at random; found slice by slice."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

# By computing type: the integers of the same width, and by how far their bits are shifted in each pass.
PASSES = {torch.float32: (torch.int32, (16, 0)), torch.float64: (torch.int64, (48, 32, 16, 0))}
BINS = 1 << 16


class KthLargest:
    """The ``k``-th largest magnitude of a tensor, exactly, without holding the tensor.

    Magnitudes are ordered as their bits read as integers are. Each pass counts the next 16 bits of those that agree
    with what is known so far: two passes for float32, four for float64.
    """

    def __init__(self, k: int, dtype: torch.dtype):
        self._dtype = dtype
        self._integers, self._shifts = PASSES[dtype]
        self.passes = len(self._shifts)
        self._left, self._known = k, 0
        self._counts = np.zeros(BINS, dtype=np.int64)
        self.value = 0.0

    def observe(self, number: int, values: Tensor) -> None:
        """A slice of pass ``number``."""
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
    """Which of the elements ``start``, ``start + 1``, ... of a tensor stay: bool, [count].

    Each element has its own random number, given by the seed, the tensor's name, the model's number and the element's
    place (Philox counts), whatever slice it comes in. ``start`` must be a multiple of 4.
    """
    digest = hashlib.sha256(f"{seed}/{model}/{name}".encode()).digest()
    # Philox makes four numbers a count. Its raw stream is the same in every version of numpy.
    stream = np.random.Philox(key=int.from_bytes(digest[:16], "little")).advance(start // 4)
    return torch.from_numpy(stream.random_raw(count) < np.uint64(min(int(density * 2.0**64), 2**64 - 1)))
