"""Select the elements of a task vector to keep, slice by slice: the largest, the middle ones, or random ones."""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shodh_moe.merging.recipe import block_sums

# For each dtype: the integer dtype of the same width, and the shift of its bits in each pass.
PASSES = {torch.float32: (torch.int32, (16, 0)), torch.float64: (torch.int64, (48, 32, 16, 0))}
BINS = 1 << 16
CHUNK = 1 << 16  # elements that are ranked at once, or one row if that is longer
SMALLEST_NORM = 1e-7  # below it an L1 norm is not restored, as in mergekit


class Sparsifier(Protocol):
    """Sparsifies the task vector d of one model for one tensor.

    Attributes:
        passes: number of times that the whole tensor must be observed before `apply` is called.
        held: bytes of memory that it keeps or needs beyond a few slices.
    """

    passes: int
    held: int

    def observe(self, number: int, start: int, delta: Tensor) -> None:
        """Observe the slice from element ``start`` on in pass ``number``; may overwrite it."""

    def end_pass(self, number: int) -> None:
        """Finish pass ``number`` after its last slice."""

    def apply(self, start: int, delta: Tensor) -> Tensor:
        """Sparsify a slice in place, and return it."""


class Largest:
    """Keeps the ``k`` largest magnitudes, and all equal to the smallest of them (TIES)."""

    held = BINS * 8

    def __init__(self, k: int, dtype: torch.dtype):
        self._limit = KthLargest(k, dtype)
        self.passes = self._limit.passes

    def observe(self, number: int, start: int, delta: Tensor) -> None:
        self._limit.observe(number, delta)

    def end_pass(self, number: int) -> None:
        self._limit.end_pass(number)

    def apply(self, start: int, delta: Tensor) -> Tensor:
        delta *= delta.abs() >= self._limit.value
        return delta


class Middle:
    """Drops the share ``gamma`` of largest magnitudes, and the smallest until ``density`` is left (Breadcrumbs).

    Elements equal to a limit are kept. If ``gamma`` and ``density`` exceed 1 together, fewer large ones are dropped.
    """

    held = 2 * BINS * 8

    def __init__(self, density: float, gamma: float, numel: int, dtype: torch.dtype):
        kept = int(density * numel)
        small = max(0, numel - kept - int(gamma * numel))
        self._any = kept > 0
        # The smallest kept element has `small` below it, the largest `small + kept - 1`.
        self._low, self._high = KthLargest(numel - small, dtype), KthLargest(max(numel - small - kept + 1, 1), dtype)
        self.passes = self._low.passes

    def observe(self, number: int, start: int, delta: Tensor) -> None:
        self._low.observe(number, delta)
        self._high.observe(number, delta)

    def end_pass(self, number: int) -> None:
        self._low.end_pass(number)
        self._high.end_pass(number)

    def apply(self, start: int, delta: Tensor) -> Tensor:
        size = delta.abs()
        delta *= (size >= self._low.value) & (size <= self._high.value) & self._any
        return delta


class Random:
    """Keeps each element with probability ``density``, divided by it (DARE)."""

    passes = 0
    held = 0

    def __init__(self, density: float, seed: int, name: str, model: int):
        self._density, self._seed, self._name, self._model = density, seed, name, model

    def observe(self, number: int, start: int, delta: Tensor) -> None: ...

    def end_pass(self, number: int) -> None: ...

    def apply(self, start: int, delta: Tensor) -> Tensor:
        delta *= kept_at_random(self._density, self._seed, self._name, self._model, start, delta.numel())
        delta /= self._density
        return delta


class Ranked:
    """Keeps an element with a probability that grows with the rank of its magnitude in its row (DELLA's MAGPRUNE).

    Probabilities rise linearly from ``density - epsilon`` at the smallest to ``density + epsilon`` at the largest
    element of a row. Equal elements are ranked by position, and the element of a row of one has ``density``. As in
    mergekit, a row is along the second axis, or the first if there is no second; real and imaginary parts of a
    complex tensor are in different rows.

    The rows are ranked in the first pass, as soon as they are complete; one bit per element is kept.

    Args:
        shape, parts: shape of the tensor, and the real numbers of one element.
        seed, name, model: determine the random numbers, with each element's position.
    """

    passes = 1

    def __init__(
        self,
        density: float,
        epsilon: float,
        shape: tuple[int, ...],
        parts: int,
        seed: int,
        name: str,
        model: int,
    ):
        self._density, self._epsilon = density, epsilon
        self._seed, self._name, self._model = seed, name, model
        self._ranked = shape[1] if len(shape) > 1 else math.prod(shape)
        self._inner = math.prod(shape[2:]) * parts
        self._numel = math.prod(shape) * parts
        self._kept = np.zeros(0, dtype=np.uint8)
        self._waiting: list[Tensor] = []  # magnitudes of the incomplete row
        self._count, self._done = 0, 0
        self._bits = np.zeros(0, dtype=bool)  # fewer than 8, until they fill a byte
        # Besides the kept bits: the incomplete row twice, and for a chunk its order, ranks and random numbers.
        self.held = self._numel // 8 + 64 * max(self._ranked * self._inner, CHUNK)

    def observe(self, number: int, start: int, delta: Tensor) -> None:
        if not len(self._kept):
            self._kept = np.zeros(-(-self._numel // 8), dtype=np.uint8)
        row = self._ranked * self._inner
        self._waiting.append(delta.abs_())
        self._count += delta.numel()
        complete = self._count // row * row
        if not complete:
            return
        waiting = torch.cat(self._waiting)
        self._waiting, self._count = [waiting[complete:].clone()], self._count - complete
        for rows in waiting[:complete].split(max(CHUNK // row, 1) * row):
            self._choose(rows)

    def _choose(self, sizes: Tensor) -> None:
        """Choose the elements to keep among some whole rows."""
        rows = sizes.view(-1, self._ranked, self._inner)
        order = rows.argsort(dim=1, stable=True)
        rank = torch.arange(self._ranked, dtype=torch.float32)[None, :, None].expand_as(rows)
        share = torch.empty(rows.shape).scatter_(1, order, rank)
        share = share / (self._ranked - 1) if self._ranked > 1 else share.fill_(0.5)
        keep = (self._density - self._epsilon) + share * 2 * self._epsilon
        drawn = random_numbers(self._seed, self._name, self._model, self._done, sizes.numel())
        kept = drawn * 2.0**-64 < keep.view(-1).double().numpy()
        # Bytes are filled from the last call's left-over bits on.
        bits = np.concatenate([self._bits, kept])
        first = (self._done - len(self._bits)) // 8
        self._done += sizes.numel()
        whole = len(bits) if self._done == self._numel else len(bits) // 8 * 8
        packed = np.packbits(bits[:whole])
        self._kept[first : first + len(packed)] = packed
        self._bits = bits[whole:]

    def end_pass(self, number: int) -> None:
        self._waiting = []

    def apply(self, start: int, delta: Tensor) -> Tensor:
        count = delta.numel()
        packed = self._kept[start // 8 : -(-(start + count) // 8)]  # slices begin at multiples of 8
        delta *= torch.from_numpy(np.unpackbits(packed, count=count).view(bool))
        return delta


class KeepNorm:
    """Scales what another sparsifier keeps so that the L1 norm of the whole tensor stays (mergekit's ``rescale``)."""

    def __init__(self, inner: Sparsifier):
        self._inner = inner
        self.passes, self.held = inner.passes + 1, inner.held
        self._before: list[float] = []
        self._after: list[float] = []
        self._scale = 1.0

    def observe(self, number: int, start: int, delta: Tensor) -> None:
        if number < self._inner.passes:
            self._inner.observe(number, start, delta)
            return
        self._before.extend(block_sums(delta.abs()))
        self._after.extend(block_sums(self._inner.apply(start, delta).abs_()))

    def end_pass(self, number: int) -> None:
        if number < self._inner.passes:
            self._inner.end_pass(number)
            return
        before, after = math.fsum(self._before), math.fsum(self._after)
        if min(before, after) >= SMALLEST_NORM:
            self._scale = before / after

    def apply(self, start: int, delta: Tensor) -> Tensor:
        return self._inner.apply(start, delta).mul_(self._scale)


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
    """Random mask of the elements to keep among ``start``, ``start + 1``, ... of a tensor: bool [count]."""
    drawn = random_numbers(seed, name, model, start, count)
    return torch.from_numpy(drawn < np.uint64(min(int(density * 2.0**64), 2**64 - 1)))


def random_numbers(seed: int, name: str, model: int, start: int, count: int) -> np.ndarray:
    """Random numbers of the elements ``start``, ``start + 1``, ... of a tensor: uint64 [count].

    Each depends on the seed, the tensor's name, the model's index and the element's position (the Philox counter), but
    not on the slicing.
    """
    digest = hashlib.sha256(f"{seed}/{model}/{name}".encode()).digest()
    # Philox yields four numbers per count. Its raw stream is the same in every version of numpy.
    skipped = start % 4
    stream = np.random.Philox(key=int.from_bytes(digest[:16], "little")).advance(start // 4)
    return stream.random_raw(skipped + count)[skipped:]
