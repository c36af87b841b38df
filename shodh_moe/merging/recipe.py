"""What a merge method is to the stream: a recipe for one tensor, applied in slices; and the sums that methods share.

A recipe first observes the whole tensor ``passes`` times (for quantities that depend on all elements), then computes
the result slice by slice. Slices are 1-D tensors of float32 or float64; real and imaginary parts of a complex tensor
are separate elements. The result does not depend on the slicing: sums are over fixed blocks and added exactly.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shodh_moe.merging.alpha import Composition
from shodh_moe.merging.settings import Lookup

BLOCK = 32768  # elements of a partial sum; too few for torch to split a sum among threads


class Recipe(Protocol):
    """A merge method, applied to one tensor of one output.

    Attributes:
        passes: number of times that the whole tensor must be observed before `result` is called.
        held: bytes of memory that the recipe keeps or needs beyond a few slices; allocated when it observes.
    """

    passes: int
    held: int

    def observe(self, number: int, start: int, inputs: list[Tensor]) -> None:
        """Observe the slice from element ``start`` on in pass ``number``; ``inputs``: base (if any) and models."""

    def end_pass(self, number: int) -> None:
        """Finish pass ``number`` after its last slice."""

    def result(self, start: int, inputs: list[Tensor]) -> Tensor:
        """Compute the merged slice as a new tensor."""


@dataclass(frozen=True)
class TensorMerge:
    """One tensor to merge.

    Attributes:
        method: name of the method, a key of `METHODS`.
        lookup: its parameters.
        name: name of the tensor.
        shape: its shape; that of the complex numbers if it is complex.
        parts: real numbers of an element: 2 if the tensor is complex, else 1.
        models: number of models besides the base.
        base: whether there is a base.
        dtype: dtype in which the merge is computed.
        composition: for ccm: coefficients of the base and the models.
    """

    method: str
    lookup: Lookup
    name: str
    shape: tuple[int, ...]
    parts: int
    models: int
    base: bool
    dtype: torch.dtype
    composition: Composition | None = None

    @property
    def numel(self) -> int:
        """Number of real elements."""
        return math.prod(self.shape) * self.parts


def weighted_sum(coefficients: list[float], inputs: list[Tensor]) -> Tensor:
    """sum_i c_i x_i as a new tensor. Inputs with coefficient 0 are ignored; 1 copies bit for bit."""
    total: Tensor | None = None
    for coefficient, values in zip(coefficients, inputs, strict=True):
        if coefficient == 0:
            continue
        # No fused multiply-add: its rounding would differ at the end of a slice.
        term = values.clone() if coefficient == 1 else values * coefficient
        total = term if total is None else total.add_(term)
    return torch.zeros_like(inputs[0]) if total is None else total


def affine_sum(coefficients: list[float], inputs: list[Tensor]) -> Tensor:
    """`weighted_sum` for coefficients that add up to 1: elements that all used inputs have in common stay bit for bit.

    So a part that the experts share is not changed by rounding, whatever alpha.
    """
    used = [(coefficient, values) for coefficient, values in zip(coefficients, inputs, strict=True) if coefficient]
    total = weighted_sum(coefficients, inputs)
    if len(used) > 1:
        first, *others = (values for _, values in used)
        common = first == others[0]
        for values in others[1:]:
            common &= first == values
        torch.where(common, first, total, out=total)
    return total


def sum_of(tensors: list[Tensor]) -> Tensor:
    """The sum of tensors as a new tensor."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def block_sums(values: Tensor) -> list[float]:
    """Sums of consecutive blocks in float64; independent of the slicing if slices begin at multiples of a block."""
    return [float(block.sum(dtype=torch.float64)) for block in values.split(BLOCK)]


class InnerProducts:
    """<v_i, v_j> of every row of several tensors, in float64, added up slice by slice.

    Args:
        vectors: number of tensors K.
        numel: number of elements of a tensor.
        row: elements of a row; ``numel`` for the inner products of whole tensors.
    """

    def __init__(self, vectors: int, numel: int, row: int):
        self._row, self._rows, self._vectors = max(row, 1), numel // max(row, 1), vectors
        self._pairs = list(itertools.combinations_with_replacement(range(vectors), 2))
        self._sums: np.ndarray | None = None

    @property
    def held(self) -> int:
        """Bytes of the sums and of the matrices made from them."""
        return 3 * self._vectors**2 * self._rows * 8

    def add(self, start: int, vectors: list[Tensor]) -> None:
        """Add the slice from element ``start`` on, which begins at a multiple of `BLOCK`."""
        if self._sums is None:
            self._sums = np.zeros((len(self._pairs), self._rows))
        wide = [vector.double().numpy() for vector in vectors]
        for begin in range(0, len(wide[0]), BLOCK):
            end = min(begin + BLOCK, len(wide[0]))
            first = (start + begin) // self._row
            # Positions in the block at which a row begins, and the block's own start.
            cuts = np.arange(first * self._row, start + end, self._row) - (start + begin)
            cuts[0] = 0
            for k, (i, j) in enumerate(self._pairs):
                parts = np.add.reduceat(wide[i][begin:end] * wide[j][begin:end], cuts)
                self._sums[k, first : first + len(parts)] += parts

    def matrices(self) -> np.ndarray:
        """Return the inner products as symmetric matrices [rows, K, K]."""
        found = np.zeros((self._rows, self._vectors, self._vectors))
        if self._sums is not None:
            for sums, (i, j) in zip(self._sums, self._pairs, strict=True):
                found[:, i, j] = found[:, j, i] = sums
        return found
