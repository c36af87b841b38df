"""Curl and divergence on a periodic grid with circulant derivative operators (DESIGN 3.1).

The derivative along one axis is a product with a dense, antisymmetric N x N matrix: at N <= 256 that
batched matrix product beats Fourier transforms (see benchmarks/). Matrices that act along different
axes commute, so the divergence of a curl vanishes to rounding, whatever the matrices hold.

Shapes: B batch, 3 vector components, X Y Z space.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

OPERATORS = ("spectral",)


@lru_cache(maxsize=64)
def _matrix(size: int, operator: str, spacing: float) -> Tensor:
    if operator != "spectral":
        raise ValueError(f"unknown derivative operator {operator!r}; known: {', '.join(OPERATORS)}")
    offset = torch.arange(size)[:, None] - torch.arange(size)[None, :]
    angle = offset.to(torch.float64) * (torch.pi / size)
    sign = 1.0 - 2.0 * (offset % 2).to(torch.float64)
    # Even N: cot, which leaves the Nyquist mode out; odd N has no such mode and gets csc.
    kernel = sign / (torch.tan(angle) if size % 2 == 0 else torch.sin(angle))
    kernel.fill_diagonal_(0.0)
    if size % 2 == 0:  # cot(pi/2) = 0 exactly; float64 leaves 6e-17, which would break the antisymmetry
        kernel[offset.abs() == size // 2] = 0.0
    matrix = kernel * (torch.pi / (size * spacing))
    return (matrix - matrix.T) / 2


def differentiation_matrix(
    size: int, operator: str, spacing: float, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """D with (D f)_j the derivative of f at point j, [size, size], exactly antisymmetric.

    ``spectral`` is the Fourier differentiation matrix of period ``size * spacing`` with the Nyquist
    derivative set to zero (Trefethen, Spectral Methods in MATLAB, ch. 3). Built in float64, then rounded.
    """
    return _matrix(size, operator, spacing).to(device=device, dtype=dtype)


def _derivative(f: Tensor, axis: int, operator: str, spacing: float) -> Tensor:
    """Derivative of f[..., X, Y, Z] along axis 0, 1 or 2 of the last three."""
    d = differentiation_matrix(f.shape[axis - 3], operator, spacing, f.dtype, f.device)
    if axis == 0:
        return (d @ f.flatten(-2)).view(f.shape)
    if axis == 1:
        return d @ f
    return f @ d.T


def curl(
    potential_B3XYZ: Tensor, mean_B3: Tensor | None = None, operator: str = "spectral", spacing: float = 1.0
) -> Tensor:
    """u = curl_D(A) + Ubar, [B, 3, X, Y, Z] in the dtype of A.

    u_x = D_y A_z - D_z A_y and cyclic; ``mean_B3`` is the constant part that a periodic curl cannot hold.
    D is antisymmetric, so the adjoint of this map is the map itself.
    """
    a_x, a_y, a_z = potential_B3XYZ.contiguous().unbind(1)

    def d(f: Tensor, axis: int) -> Tensor:
        return _derivative(f, axis, operator, spacing)

    u = torch.stack(
        (d(a_z, 1) - d(a_y, 2), d(a_x, 2) - d(a_z, 0), d(a_y, 0) - d(a_x, 1)),
        dim=1,
    )
    return u if mean_B3 is None else u + mean_B3[:, :, None, None, None]


def divergence(u_B3XYZ: Tensor, operator: str = "spectral", spacing: float = 1.0) -> Tensor:
    """div_D(u) = D_x u_x + D_y u_y + D_z u_z, [B, X, Y, Z], with the same operators as `curl`."""
    u_x, u_y, u_z = u_B3XYZ.contiguous().unbind(1)
    return (
        _derivative(u_x, 0, operator, spacing)
        + _derivative(u_y, 1, operator, spacing)
        + _derivative(u_z, 2, operator, spacing)
    )
