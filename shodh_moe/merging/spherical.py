"""Interpolation on a sphere: `slerp` between two models, `karcher` for any number of them."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from shodh_moe.merging.recipe import InnerProducts, Recipe, TensorMerge, block_sums, weighted_sum

COLINEAR = 0.9995  # above this cosine slerp is linear, as in mergekit


class Slerp:
    """Spherical linear interpolation from the base x_0 to the model x_1 (Shoemake, SIGGRAPH 1985; mergekit's `slerp`).

    sin((1-t) phi)/sin(phi) x_0 + sin(t phi)/sin(phi) x_1, phi the angle between the tensors as vectors. Nearly
    colinear and zero vectors (|cos| > 0.9995) are interpolated linearly. t = 0 and 1 copy x_0 and x_1 bit for bit.
    """

    passes = 1
    held = 0

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


class Karcher:
    """The mean of the models' directions on the unit sphere, times the mean of their norms (mergekit's `karcher`).

    Directions are u_i = x_i / |x_i|, over the whole tensor. The mean starts at their normalized sum. Each iteration
    averages the tangents that lead from it to each u_i and follows the average, until that is shorter than ``tol``
    (arXiv 2603.04972). All these vectors are sums of the u_i, so the models' inner products determine them, and the
    tensor is never in memory as a whole.

    Args:
        models: number of models, all of equal weight.
        base: whether there is a base, which is not one of them.
        numel: number of real elements.
        iterations, tol: mergekit's ``max_iter`` and ``tol``. Models with a norm up to ``tol`` have no direction.
    """

    def __init__(self, models: int, base: bool, numel: int, iterations: int, tol: float):
        self._models, self._base, self._iterations, self._tol = models, base, iterations, tol
        self._products = InnerProducts(models, numel, numel)
        # A single model is copied bit for bit.
        self.passes, self._coefficients = int(models > 1), [1.0] * models
        self.held = self._products.held

    def observe(self, number: int, start: int, inputs: list[Tensor]) -> None:
        self._products.add(start, inputs[int(self._base) :])

    def end_pass(self, number: int) -> None:
        self._coefficients = karcher_mean(self._products.matrices()[0], self._iterations, self._tol)

    def result(self, start: int, inputs: list[Tensor]) -> Tensor:
        return weighted_sum(self._coefficients, inputs[int(self._base) :])


def karcher_mean(product_MM: np.ndarray, iterations: int, tol: float) -> list[float]:
    """Return the models' coefficients in their Karcher mean, from their inner products, float64 [models, models]."""
    norms = np.sqrt(np.diag(product_MM))
    used = np.flatnonzero(norms > tol)
    coefficients = np.zeros(len(norms))
    if not len(used):
        return list(coefficients)
    # From here on, vectors are coefficients of the directions u_i, and their inner products are cosines.
    cosines = product_MM[np.ix_(used, used)] / np.outer(norms[used], norms[used])
    weight = 1 / len(used)

    def length(vector: np.ndarray) -> float:
        return math.sqrt(max(vector @ cosines @ vector, 0.0))

    mean = np.full(len(used), weight)
    if length(mean) < tol:  # the directions cancel
        mean = np.zeros(len(used))
        mean[0] = 1
    mean /= length(mean)
    for _ in range(iterations):
        tangent = np.zeros(len(used))
        for i, cosine in enumerate(np.clip(cosines @ mean, -1, 1)):
            angle = math.acos(cosine)
            # Neither the point itself nor the opposite point of the sphere is in a certain direction.
            if min(angle, math.pi - angle) < tol:
                continue
            toward = -cosine * mean
            toward[i] += 1
            tangent += weight * angle / math.sin(angle) * toward
        step = length(tangent)
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean /= length(mean)
    coefficients[used] = norms.mean() * mean / norms[used]
    return list(coefficients)


def slerp_recipe(merge: TensorMerge) -> Recipe:
    return Slerp(merge.lookup.value("t", merge.name))


def karcher_recipe(merge: TensorMerge) -> Recipe:
    iterations, tol = merge.lookup.value("max_iter", merge.name, 10), merge.lookup.value("tol", merge.name, 1e-5)
    return Karcher(merge.models, merge.base, merge.numel, int(iterations), tol)
