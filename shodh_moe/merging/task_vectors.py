"""Methods that add sparsified task vectors d_i = x_i - x_0 to the base."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.merging.recipe import Recipe, TensorMerge, sum_of
from shodh_moe.merging.sparsify import KeepNorm, Largest, Middle, Random, Ranked, Sparsifier


class Kind(NamedTuple):
    """A method of this family.

    Attributes:
        keeps: which elements of each task vector are kept.
        signs: whether only elements with the sign of the sum are added.
        normalize, rescale: defaults of these parameters.
    """

    keeps: Literal["all", "largest", "random", "middle", "ranked"]
    signs: bool
    normalize: bool = False
    rescale: bool = False


KINDS = {
    "task_arithmetic": Kind("all", signs=False),
    "ties": Kind("largest", signs=True, normalize=True),
    "dare": Kind("random", signs=False),
    "dare_linear": Kind("random", signs=False),
    "dare_ties": Kind("random", signs=True),
    "breadcrumbs": Kind("middle", signs=False),
    "breadcrumbs_ties": Kind("middle", signs=True),
    "della": Kind("ranked", signs=True, normalize=True, rescale=True),
    "della_linear": Kind("ranked", signs=False, rescale=True),
}


class TaskVectors:
    """theta_0 + lambda sum_i w_i d_i with d_i = x_i - theta_0, after sparsifying the d_i.

    task_arithmetic: no sparsification (arXiv 2212.04089).
    ties: keep the share ``density`` of elements with the largest |d| in each d_i, including ties; then keep for each
        element those w_i d_i with the sign of their sum (zero counts as +); ``normalize`` (the default) divides by
        the sum of the kept w_i (arXiv 2306.01708, in mergekit's weighted form).
    dare, dare_linear: keep each element of d_i with probability ``density`` and divide it by that (arXiv 2311.03099).
    dare_ties: like dare, then select by sign as in ties.
    breadcrumbs: drop the share ``gamma`` of largest |d|, and the smallest until ``density`` is left (arXiv 2312.06795).
    breadcrumbs_ties: like breadcrumbs, then select by sign as in ties.
    della_linear: keep each element with a probability between ``density`` - ``epsilon`` and ``density`` + ``epsilon``
        that grows with its rank in its row (arXiv 2406.11617, in mergekit's form).
    della: like della_linear, then select by sign as in ties, with ``normalize`` by default.

    ``rescale`` multiplies what is left of d_i so that its L1 norm over the tensor stays; della does by default. Nothing
    is dropped or rescaled at ``density`` 1. Models with weight 0 are ignored; without any others, or with lambda = 0,
    the base is copied bit for bit.

    Raises:
        UserError: ``density`` and ``epsilon`` give a probability outside of 0 to 1.
    """

    def __init__(self, merge: TensorMerge):
        kind, name, value = KINDS[merge.method], merge.name, merge.lookup.value
        self._signs = kind.signs
        self._scale = value("lambda", name, 1.0)
        self._normalize = bool(value("normalize", name, kind.normalize))
        self._weights = [value("weight", name, None, i) for i in range(merge.models)]
        self._used = [i for i in range(merge.models) if self._weights[i] != 0 and self._scale != 0]
        rescale = bool(value("rescale", name, kind.rescale))
        self._sparsifiers: dict[int, Sparsifier] = {}
        for i in self._used if kind.keeps != "all" else []:
            density = value("density", name, 1.0, i)
            if density < 1:
                made = _sparsifier(kind, merge, i, density)
                self._sparsifiers[i] = KeepNorm(made) if rescale else made
        self.passes = max((one.passes for one in self._sparsifiers.values()), default=0)
        self.held = sum(one.held for one in self._sparsifiers.values())

    def observe(self, number: int, start: int, inputs: list[Tensor]) -> None:
        for i, sparsifier in self._sparsifiers.items():
            sparsifier.observe(number, start, inputs[1 + i] - inputs[0])

    def end_pass(self, number: int) -> None:
        for sparsifier in self._sparsifiers.values():
            sparsifier.end_pass(number)

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
        if i in self._sparsifiers:
            delta = self._sparsifiers[i].apply(start, delta)
        if self._weights[i] != 1:
            delta *= self._weights[i]
        return delta


def _sparsifier(kind: Kind, merge: TensorMerge, model: int, density: float) -> Sparsifier:
    """The sparsifier of one model, for a ``density`` below 1."""
    name, value = merge.name, merge.lookup.value
    if kind.keeps == "largest":
        return Largest(max(1, int(density * merge.numel)), merge.dtype)
    if kind.keeps == "middle":
        return Middle(density, value("gamma", name, 0.01, model), merge.numel, merge.dtype)
    seed = int(value("seed", name, 0.0))
    if kind.keeps == "random":
        return Random(density, seed, name, model)
    epsilon = value("epsilon", name, 0.15, model)
    if not epsilon < density < 1 - epsilon:
        raise UserError(
            f"{merge.method}: density {density:g} and epsilon {epsilon:g} of tensor {name} give probabilities outside "
            "of 0 to 1: choose a smaller epsilon (0.15 by default)"
        )
    return Ranked(density, epsilon, merge.shape, merge.parts, seed, name, model)


def task_vector_recipe(merge: TensorMerge) -> Recipe:
    return TaskVectors(merge)
