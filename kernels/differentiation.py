"""Derivative operators on a periodic line as dense circulant matrices, and as stencils if local (DESIGN 3.1).

Operators along different axes commute, which is all it takes for the divergence of a curl to vanish.

==========  ============================================  ========  =====================
operator    (D f)[j]                                      accuracy  points needed
==========  ============================================  ========  =====================
spectral    derivative of the trigonometric interpolant   all       1 (256 is the limit)
central2    (f[j+1] - f[j-1]) / 2h                        h^2       3
central4    (8 (f[j+1] - f[j-1]) - (f[j+2] - f[j-2])) / 12h  h^4    5
staggered   (f[j+1] - f[j]) / h                           h^2       2
==========  ============================================  ========  =====================

``spectral`` sets the derivative of the Nyquist mode to zero. ``staggered`` belongs to the MAC grid
(Harlow & Welch 1965), where a difference is centred between its two points and is therefore accurate to h^2.

Staggered positions, in units of h, for array index (i, j, k):

- A on edges: A_x at (i + 1/2, j, k), A_y at (i, j + 1/2, k), A_z at (i, j, k + 1/2);
- u on faces: u_x at (i, j + 1/2, k + 1/2), u_y at (i + 1/2, j, k + 1/2), u_z at (i + 1/2, j + 1/2, k);
- the divergence at cell centres (i + 1/2, j + 1/2, k + 1/2).

Therefore all differences in the curl and the divergence are forward: u_x[i, j, k] needs A_z at j and j + 1, and
div[i, j, k] needs u_x at i and i + 1. A divergence with backward differences would belong to faces numbered the
other way round, and would not vanish for this curl. Backward differences are -D^T and give the adjoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# {offset: weight} of the local operators for spacing 1.
STENCILS = {
    "central2": {-1: -1 / 2, 1: 1 / 2},
    "central4": {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12},
    "staggered": {0: -1.0, 1: 1.0},
}
OPERATORS = ("spectral", *STENCILS)
MINIMUM = {"spectral": 1, "central2": 3, "central4": 5, "staggered": 2}
MATRIX_LIMIT = 256  # most points along an axis for which `curl` and `divergence` use dense matrices


def check_operator(operator: str, spacing: float) -> None:
    """Raise ValueError for an unknown operator or a spacing that is not a positive number."""
    if operator not in OPERATORS:
        raise ValueError(f"unknown derivative operator {operator!r}; known: {', '.join(OPERATORS)}")
    number = _plain(spacing)
    if not isinstance(number, (int, float)) or not (number > 0 and math.isfinite(number)):
        raise ValueError(f"spacing must be positive and finite, not {spacing!r}")


def spacings(spacing: float | Sequence[float], operator: str) -> list[float]:
    """Check the operator and the spacing, one number or one per axis, and return [x, y, z].

    Raises:
        ValueError: an unknown operator; or not one or three positive, finite numbers.
    """
    given = _plain(spacing)
    each = list(given) if isinstance(given, (list, tuple)) else [given] * 3
    if len(each) != 3:
        raise ValueError(f"spacing must be one positive number or three, along x, y and z, not {spacing!r}")
    for one in each:
        check_operator(operator, one)
    return [float(one) for one in each]


def _plain(value: Any) -> Any:
    """Convert numbers and lists of numpy and torch to those of Python."""
    return value.tolist() if hasattr(value, "tolist") else value


def check_size(name: str, size: int, operator: str) -> None:
    """Raise ValueError if ``operator`` needs more than ``size`` points. ``name`` names the size in the message."""
    if size < MINIMUM[operator]:
        raise ValueError(f"{name} is {size}: the operator {operator!r} needs at least {MINIMUM[operator]} points")


def stencil(operator: str, spacing: float, adjoint: bool = False) -> dict[int, float]:
    """Offsets and weights of a local operator, or of -D^T if ``adjoint`` (backward for forward differences)."""
    sign = -1 if adjoint else 1  # (-D^T)[j, i] = -D[i, j]: offsets and weights change sign
    return {sign * offset: sign * weight / spacing for offset, weight in STENCILS[operator].items()}


def _spectral(size: int, spacing: float) -> Tensor:
    index = torch.arange(size, device="cpu")
    offset = index[:, None] - index[None, :]
    angle = offset.to(torch.float64) * (torch.pi / size)
    sign = 1.0 - 2.0 * (offset % 2).to(torch.float64)
    # Even N: cot, which omits the Nyquist mode; odd N has no such mode and uses csc.
    kernel = sign / (torch.tan(angle) if size % 2 == 0 else torch.sin(angle))
    kernel.fill_diagonal_(0.0)
    if size % 2 == 0:  # cot(pi/2) = 0 exactly; float64 leaves 6e-17, which would break the antisymmetry
        kernel[offset.abs() == size // 2] = 0.0
    matrix = kernel * (torch.pi / (size * spacing))
    return (matrix - matrix.T) / 2


def _local(size: int, operator: str, spacing: float) -> Tensor:
    identity = torch.eye(size, dtype=torch.float64, device="cpu")
    return sum(
        (weight * identity.roll(offset, dims=1) for offset, weight in stencil(operator, spacing).items()),
        start=torch.zeros_like(identity),
    )


@lru_cache(maxsize=64)
def cached_matrix(
    size: int, operator: str, spacing: float, dtype: torch.dtype, device: torch.device, adjoint: bool = False
) -> Tensor:
    """`differentiation_matrix`, or -D^T if ``adjoint``. The result is cached: do not write to it."""
    with torch.inference_mode(False), torch.no_grad():
        matrix = _spectral(size, spacing) if operator == "spectral" else _local(size, operator, spacing)
        matrix = -matrix.T if adjoint else matrix
        return matrix.to(device=device, dtype=dtype).contiguous()


def differentiation_matrix(
    size: int, operator: str, spacing: float, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """The matrix D [size, size] with (D f)_j the derivative of f at point j; exactly antisymmetric unless staggered.

    ``spectral`` is the Fourier differentiation matrix of period ``size * spacing`` with the Nyquist
    derivative set to zero (Trefethen, Spectral Methods in MATLAB, ch. 3). Computed in float64, then rounded.

    Raises:
        ValueError: unknown operator, a spacing that is not positive, fewer points than the operator needs.
    """
    check_operator(operator, spacing)
    check_size("size", size, operator)
    return cached_matrix(size, operator, float(spacing), dtype, torch.device(device)).clone()
