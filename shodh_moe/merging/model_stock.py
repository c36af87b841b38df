"""Model stock: interpolate between the base and the models' average by the angle between the task vectors."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from shodh_moe.merging.recipe import InnerProducts, Recipe, TensorMerge, weighted_sum

SMALLEST = 1e-6  # limit of a product of two norms, and of the denominator of t; the same as mergekit's


class ModelStock:
    """t mean_i x_i + (1 - t) x_0 with t = N cos / (1 + (N - 1) cos), for N models (arXiv 2403.19522).

    cos is the mean cosine between two of the d_i = x_i - x_0, over the whole tensor, or over each of its rows along
    the last axis. Task vectors whose norms have a product below 1e-6 count as nearly orthogonal, as in mergekit, so
    that t is nearly 0. Where the denominator vanishes, t = 0.

    Args:
        models: number of models N besides the base.
        numel: number of real elements.
        row: real elements of a row; ``numel`` for one cosine of the whole tensor.
    """

    passes = 1

    def __init__(self, models: int, numel: int, row: int):
        self._models, self._row = models, max(row, 1)
        self._products = InnerProducts(models, numel, self._row)
        self.held = self._products.held
        self._t = np.zeros(0)

    def observe(self, number: int, start: int, inputs: list[Tensor]) -> None:
        self._products.add(start, [values - inputs[0] for values in inputs[1:]])

    def end_pass(self, number: int) -> None:
        products = self._products.matrices()
        norms = np.sqrt(np.diagonal(products, axis1=1, axis2=2))
        cosines = [
            np.clip(products[:, i, j] / np.maximum(norms[:, i] * norms[:, j], SMALLEST), -1, 1)
            for i, j in itertools.combinations(range(self._models), 2)
        ]
        cosine = np.mean(cosines, axis=0)
        denominator = 1 + (self._models - 1) * cosine
        singular = np.abs(denominator) < SMALLEST
        self._t = np.where(singular, 0, self._models * cosine / np.where(singular, 1, denominator))

    def result(self, start: int, inputs: list[Tensor]) -> Tensor:
        if len(self._t) == 1:
            t = float(self._t[0])
            return weighted_sum([1 - t, *([t / self._models] * self._models)], inputs)
        rows = torch.arange(start, start + inputs[0].numel()) // self._row
        t_rows = torch.from_numpy(self._t)[rows].to(inputs[0].dtype)
        average = weighted_sum([1 / self._models] * self._models, inputs[1:])
        return t_rows * average + (1 - t_rows) * inputs[0]


def model_stock_recipe(merge: TensorMerge) -> Recipe:
    by_row = bool(merge.lookup.value("filter_wise", merge.name, False)) and merge.shape
    return ModelStock(merge.models, merge.numel, merge.shape[-1] * merge.parts if by_row else merge.numel)
