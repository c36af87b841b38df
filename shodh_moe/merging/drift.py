"""Measure the distance of the experts from their base model."""

from __future__ import annotations

import itertools
import math
from typing import Any

from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.merging.recipe import block_sums


class Drift:
    """Inner products of theta_0 and d_i = theta_i - theta_0 of one tensor, accumulated over slices."""

    def __init__(self) -> None:
        self._parts: dict[str, list[float]] = {}

    def add(self, inputs: list[Tensor]) -> None:
        """Add a slice of the base and of the models."""
        base, *models = inputs
        vectors = [one - base for one in models]
        self._add("base", base, base)
        for i, j in itertools.combinations_with_replacement(range(len(vectors)), 2):
            if i == j or len(vectors) == 2:
                self._add(f"{i},{j}", vectors[i], vectors[j])

    def _add(self, key: str, a: Tensor, b: Tensor) -> None:
        self._parts.setdefault(key, []).extend(block_sums(a * b))

    def sums(self) -> dict[str, float]:
        """Return the inner products: ``base`` is that of theta_0, ``"i,j"`` that of d_i and d_j."""
        return {key: math.fsum(parts) for key, parts in self._parts.items()}


def summary(sums: list[dict[str, float]], models: list[str]) -> dict[str, Any]:
    """Return |d_i| / |theta_0| of each model over all tensors and, for two models, the cosine of d_0 and d_1.

    Args:
        sums: `Drift.sums` of every tensor.
        models: paths of the models, in the order of the indices.
    """
    keys = {key for one in sums for key in one}
    total = {key: math.fsum(one.get(key, 0.0) for one in sums) for key in keys}
    base = math.sqrt(total.get("base", 0.0))
    norms = [math.sqrt(total.get(f"{i},{i}", 0.0)) for i in range(len(models))]
    distances = {path: norm / base if base else float(norm > 0) for path, norm in zip(models, norms, strict=True)}
    found: dict[str, Any] = {"relative_distance_from_base": distances}
    if len(models) == 2 and min(norms) > 0:
        found["cosine_of_task_vectors"] = total["0,1"] / norms[0] / norms[1]
    return found


def require_near(found: dict[str, Any], base: str, limit: float) -> None:
    """Check a `summary`. Raises: UserError: an expert is too far from the base to have been trained from it."""
    for path, distance in found["relative_distance_from_base"].items():
        if distance > limit:
            raise UserError(
                f"{path} differs from {base} by {distance:.3g} times its norm, so it was not trained from it: "
                "name the right base_model, or raise the parameter distance_limit if you are sure"
            )
