"""Weighted sums of models: `linear`, and `ccm` along physical axes."""

from __future__ import annotations

import math

from torch import Tensor

from shodh_moe.merging.recipe import Recipe, TensorMerge, affine_sum, weighted_sum


class Sum:
    """sum_i c_i x_i, for `linear` and `ccm`. Inputs with coefficient 0 are ignored; 1 copies bit for bit.

    Args:
        affine: whether the coefficients add up to 1, so that common elements stay (see `affine_sum`).
    """

    passes = 0
    held = 0

    def __init__(self, coefficients: list[float], affine: bool = False):
        self._coefficients, self._sum = coefficients, affine_sum if affine else weighted_sum

    def observe(self, number: int, start: int, inputs: list[Tensor]) -> None: ...

    def end_pass(self, number: int) -> None: ...

    def result(self, start: int, inputs: list[Tensor]) -> Tensor:
        return self._sum(self._coefficients, inputs)


def linear(weights: list[float], normalize: bool, base: bool) -> Sum:
    """sum_i w_i x_i, divided by sum_i w_i if normalized (model soups, arXiv 2203.05482; mergekit's `linear`)."""
    total = math.fsum(weights) if normalize else 1.0
    # A sum near zero is not used to normalize, as in mergekit's task vectors.
    total = total if abs(total) > 1e-8 else 1.0
    return Sum([*([0.0] if base else []), *(weight / total for weight in weights)])


def linear_recipe(merge: TensorMerge) -> Recipe:
    weights = [merge.lookup.value("weight", merge.name, None, i) for i in range(merge.models)]
    return linear(weights, bool(merge.lookup.value("normalize", merge.name, True)), merge.base)


def ccm_recipe(merge: TensorMerge) -> Recipe:
    """Composition along a physical axis (arXiv 2605.14546; DESIGN 3.7)."""
    assert merge.composition
    return Sum(merge.composition.coefficients(merge.name)[0 if merge.base else 1 :], affine=True)
