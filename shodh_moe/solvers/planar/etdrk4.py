"""Fourth-order exponential time differencing (Cox and Matthews 2002; coefficients as in Kassam and Trefethen 2005).

It solves ``dv/dt = L v + N(v)`` with a real diagonal L; the linear part is exact at any time step, however stiff.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

_CONTOUR_POINTS = 32


@dataclass(frozen=True)
class Coefficients:
    """Factors of one step h, each with the shape of L.

    Attributes:
        full, half: exp(h L) and exp(h L / 2).
        inner: factor of N in the intermediate stages.
        first, middle, last: factors of N at the start, in the two middle stages and at the end of the step.
    """

    full: torch.Tensor
    half: torch.Tensor
    inner: torch.Tensor
    first: torch.Tensor
    middle: torch.Tensor
    last: torch.Tensor


def coefficients(linear: torch.Tensor, step: float, like: torch.Tensor) -> Coefficients:
    """Compute the factors of a batch of diagonals ``linear`` [B, ...] (float64) for the time step ``step``.

    They have the dtype and device of ``like``.
    """
    # One trajectory at a time: vectorised exponentials may round differently at the end of a longer array.
    rows = [_coefficients(one, step) for one in linear.cpu()]
    return Coefficients(*(torch.stack(column).to(like) for column in zip(*rows, strict=True)))


def _coefficients(linear: torch.Tensor, step: float) -> tuple[torch.Tensor, ...]:
    z0 = step * linear
    sums = [torch.zeros_like(z0) for _ in range(4)]
    # The formulas cancel near z = 0; their mean over a circle around z does not.
    for point in range(_CONTOUR_POINTS):
        angle = math.pi * (point + 0.5) / _CONTOUR_POINTS
        z = z0 + complex(math.cos(angle), math.sin(angle))
        e = torch.exp(z)
        terms = (
            (torch.exp(z / 2) - 1) / z,
            (-4 - z + e * (4 - 3 * z + z**2)) / z**3,
            (2 + z + e * (z - 2)) / z**3,
            (-4 - 3 * z - z**2 + e * (4 - z)) / z**3,
        )
        for total, term in zip(sums, terms, strict=True):
            total += term.real
    inner, first, middle, last = (step * total / _CONTOUR_POINTS for total in sums)
    return torch.exp(z0), torch.exp(z0 / 2), inner, first, 2 * middle, last


def advance(v: torch.Tensor, nonlinear: Callable[[torch.Tensor], torch.Tensor], c: Coefficients) -> torch.Tensor:
    """Advance ``v`` by one step, with ``nonlinear`` as N."""
    n_v = nonlinear(v)
    half_v = c.half * v
    a = half_v + c.inner * n_v
    n_a = nonlinear(a)
    b = half_v + c.inner * n_a
    n_b = nonlinear(b)
    n_c = nonlinear(c.half * a + c.inner * (2 * n_b - n_v))
    return c.full * v + c.first * n_v + c.middle * (n_a + n_b) + c.last * n_c
