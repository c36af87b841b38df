"""The merge methods, applied to one tensor in slices.

Each recipe first observes the whole tensor ``passes`` times (for quantities that depend on all elements), then
computes the result slice by slice. Slices are 1-D tensors of float32 or float64; real and imaginary parts of a complex
tensor are separate elements. The result does not depend on the slicing: sums are over fixed blocks and added exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shodh_moe.merging.alpha import Composition
from shodh_moe.merging.settings import BY_AXIS, Lookup, Method
from shodh_moe.merging.sparsify import KthLargest, kept_at_random

BLOCK = 32768  # elements of a partial sum; too few for torch to split a sum among threads
COLINEAR = 0.9995  # above this cosine slerp is linear, as in mergekit


class Recipe(Protocol):
    """A merge method, applied to one tensor of one output.

    Attributes:
        passes: number of times that the whole tensor must be observed before `result` is called.
    """

    passes: int

    def observe(self, number: int, start: int, inputs: list[Tensor]) -> None:
        """Observe the slice from element ``start`` on in pass ``number``; ``inputs``: base (if any) and models."""

    def end_pass(self, number: int) -> None:
        """Finish pass ``number`` after its last slice."""

    def result(self, start: int, inputs: list[Tensor]) -> Tensor:
        """Compute the merged slice as a new tensor."""


class Sum:
    """sum_i c_i x_i, for `linear` and `ccm`. Inputs with coefficient 0 are ignored; 1 copies bit for bit."""

    passes = 0

    def __init__(self, coefficients: list[float]):
        self._coefficients = coefficients

    def observe(self, number: int, start: int, inputs: list[Tensor]) -> None: ...

    def end_pass(self, number: int) -> None: ...

    def result(self, start: int, inputs: list[Tensor]) -> Tensor:
        return weighted_sum(self._coefficients, inputs)


def weighted_sum(coefficients: list[float], inputs: list[Tensor]) -> Tensor:
    """sum_i c_i x_i as a new tensor."""
    total: Tensor | None = None
    for coefficient, values in zip(coefficients, inputs, strict=True):
        if coefficient == 0:
            continue
        # No fused multiply-add: its rounding would differ at the end of a slice.
        term = values.clone() if coefficient == 1 else values * coefficient
        total = term if total is None else total.add_(term)
    return torch.zeros_like(inputs[0]) if total is None else total


def linear(weights: list[float], normalize: bool, base: bool) -> Sum:
    """sum_i w_i x_i, divided by sum_i w_i if normalized (model soups, arXiv 2203.05482; mergekit's `linear`)."""
    total = math.fsum(weights) if normalize else 1.0
    # A sum near zero is not used to normalize, as in mergekit's task vectors.
    total = total if abs(total) > 1e-8 else 1.0
    return Sum([*([0.0] if base else []), *(weight / total for weight in weights)])


class Slerp:
    """Spherical linear interpolation from the base x_0 to the model x_1 (Shoemake, SIGGRAPH 1985; mergekit's `slerp`).

    sin((1-t) phi)/sin(phi) x_0 + sin(t phi)/sin(phi) x_1, phi the angle between the tensors as vectors. Nearly
    colinear and zero vectors (|cos| > 0.9995) are interpolated linearly. t = 0 and 1 copy x_0 and x_1 bit for bit.
    """

    passes = 1

    def __init__(self, t: float):
        self._t = t
        self._sums: list[list[float]] = [[], [], []]
        self._coefficients = [1 - t, t]

    def observe(self, number: int, start: int, inputs: list[Tensor]) -> None:
        a, b = (values.double() for values in inputs)
        for sums, product in zip(self._sums, (a * a, b * b, a * b), strict=True):
            sums.extend(block_sums(product))

    def end_pass(self, number: int) -> None:
        aa, bb, ab = (math.fsum(sums) for sums in self._sums)
        # A vector with norm below 1e-8 has no direction (same limit as mergekit).
        cosine = ab / math.sqrt(aa) / math.sqrt(bb) if min(aa, bb) > 1e-16 else 1.0
        if abs(cosine) <= COLINEAR and self._t not in (0, 1):
            angle = math.acos(cosine)
            self._coefficients = [math.sin((1 - self._t) * angle), math.sin(self._t * angle)]
            self._coefficients = [one / math.sin(angle) for one in self._coefficients]

    def result(self, start: int, inputs: list[Tensor]) -> Tensor:
        return weighted_sum(self._coefficients, inputs)


class TaskVectors:
    """theta_0 + lambda sum_i w_i d_i with d_i = x_i - theta_0, after sparsifying the d_i.

    task_arithmetic: no sparsification (arXiv 2212.04089).
    ties: keep the share ``density`` of elements with the largest |d| in each d_i, including ties; then keep for each
        element those w_i d_i with the sign of their sum (zero counts as +); ``normalize`` (the default) divides by
        the sum of the kept w_i (arXiv 2306.01708, in mergekit's weighted form).
    dare, dare_linear: keep each element of d_i with probability ``density`` and divide it by that (arXiv 2311.03099).
    dare_ties: like dare, then select by sign as in ties.

    Models with weight 0 are ignored; without any others, or with lambda = 0, the base is copied bit for bit.

    Args:
        method: one of the names above.
        name: name of the tensor, which seeds its random numbers.
        numel: number of real elements (twice that of a complex tensor).
        models: number of models besides the base.
    """

    def __init__(self, method: str, lookup: Lookup, name: str, numel: int, models: int, dtype: torch.dtype):
        self._random = method.startswith("dare")
        self._signs = method in ("ties", "dare_ties")
        self._scale = lookup.value("lambda", name, 1.0)
        self._normalize = bool(lookup.value("normalize", name, method == "ties"))
        self._name, self._seed = name, int(lookup.value("seed", name, 0.0))
        self._weights = [lookup.value("weight", name, None, i) for i in range(models)]
        sparse = method != "task_arithmetic"
        self._densities = [lookup.value("density", name, 1.0, i) if sparse else 1.0 for i in range(models)]
        self._used = [i for i in range(models) if self._weights[i] != 0 and self._scale != 0]
        self._limits: dict[int, KthLargest] = {}
        if not self._random:
            for i in self._used:
                if self._densities[i] < 1:
                    self._limits[i] = KthLargest(max(1, int(self._densities[i] * numel)), dtype)
        self.passes = max((limit.passes for limit in self._limits.values()), default=0)

    def observe(self, number: int, start: int, inputs: list[Tensor]) -> None:
        for i, limit in self._limits.items():
            limit.observe(number, inputs[1 + i] - inputs[0])

    def end_pass(self, number: int) -> None:
        for limit in self._limits.values():
            limit.end_pass(number)

    def result(self, start: int, inputs: list[Tensor]) -> Tensor:
        base = inputs[0]
        if not self._used:
            return base.clone()
        vectors = [self._vector(i, start, inputs[1 + i] - base) for i in self._used]
        weights = [self._weights[i] for i in self._used]
        if self._signs:
            sign = torch.where(sum_of(vectors) >= 0, 1.0, -1.0).to(base.dtype)
            masks = [torch.sign(vector) == sign for vector in vectors]
            mixed = sum_of([vector * mask for vector, mask in zip(vectors, masks, strict=True)])
            divisor = sum_of([mask.to(base.dtype) * weight for weight, mask in zip(weights, masks, strict=True)])
            divisor[divisor == 0] = 1
        else:
            mixed = sum_of(vectors)
            total = math.fsum(weights)
            divisor = torch.tensor(total if abs(total) > 1e-8 else 1.0, dtype=base.dtype)
        if self._normalize:
            mixed /= divisor
        if self._scale != 1:
            mixed *= self._scale
        return mixed.add_(base)

    def _vector(self, i: int, start: int, delta: Tensor) -> Tensor:
        """w_i d_i, sparsified."""
        density = self._densities[i]
        if i in self._limits:
            delta *= delta.abs() >= self._limits[i].value
        elif self._random and density < 1:
            delta *= kept_at_random(density, self._seed, self._name, i, start, delta.numel())
            delta /= density
        if self._weights[i] != 1:
            delta *= self._weights[i]
        return delta


def sum_of(tensors: list[Tensor]) -> Tensor:
    """The sum of tensors as a new tensor."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def block_sums(values: Tensor) -> list[float]:
    """Sums of consecutive blocks in float64; independent of the slicing if slices begin at multiples of a block."""
    return [float(block.sum(dtype=torch.float64)) for block in values.split(BLOCK)]


@dataclass(frozen=True)
class TensorMerge:
    """One tensor to merge.

    Attributes:
        method: name of the method, a key of `METHODS`.
        lookup: its parameters.
        name: name of the tensor.
        numel: number of its elements; twice as many for a complex tensor.
        models: number of models besides the base.
        base: whether there is a base.
        dtype: dtype in which the merge is computed.
        composition: for ccm: coefficients of the base and the models.
    """

    method: str
    lookup: Lookup
    name: str
    numel: int
    models: int
    base: bool
    dtype: torch.dtype
    composition: Composition | None


def ccm_recipe(merge: TensorMerge) -> Recipe:
    """Composition along a physical axis (arXiv 2605.14546; DESIGN 3.7)."""
    assert merge.composition
    return Sum(merge.composition.coefficients(merge.name)[0 if merge.base else 1 :])


def linear_recipe(merge: TensorMerge) -> Recipe:
    weights = [merge.lookup.value("weight", merge.name, None, i) for i in range(merge.models)]
    return linear(weights, bool(merge.lookup.value("normalize", merge.name, True)), merge.base)


def slerp_recipe(merge: TensorMerge) -> Recipe:
    return Slerp(merge.lookup.value("t", merge.name))


def task_vector_recipe(merge: TensorMerge) -> Recipe:
    return TaskVectors(merge.method, merge.lookup, merge.name, merge.numel, merge.models, merge.dtype)


_TASK = ("lambda", "normalize", "weight")
_SPARSE = (*_TASK, "density")
_OWN = ("weight", "density")
# int8_mask saves memory in mergekit and changes no number.
_TIES = Method(task_vector_recipe, 0, True, True, False, _SPARSE, ("int8_mask", "distance_limit"), _OWN)
_DARE = Method(task_vector_recipe, 0, True, True, False, _SPARSE, ("int8_mask", "seed", "distance_limit"), _OWN)
# To add a method, write a function from `TensorMerge` to `Recipe` and add a line here.
METHODS = {
    # The coordinates of the models determine how many of them ccm combines.
    "ccm": Method(ccm_recipe, 0, False, True, True, ("alpha",), (*BY_AXIS[1:], "distance_limit"), ("coordinate",)),
    "linear": Method(linear_recipe, 0, False, False, False, ("weight", "normalize"), (), ("weight",)),
    "task_arithmetic": Method(task_vector_recipe, 0, True, True, False, _TASK, ("distance_limit",), ("weight",)),
    "ties": _TIES,
    "dare": _DARE,
    "slerp": Method(slerp_recipe, 1, True, True, True, ("t",), (), ()),
    "dare_linear": _DARE,
    "dare_ties": _DARE,
}


def recipe(merge: TensorMerge) -> Recipe:
    """How the method of ``merge`` merges its tensor."""
    return METHODS[merge.method].recipe(merge)
