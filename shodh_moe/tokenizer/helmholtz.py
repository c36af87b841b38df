"""The vector potential of a velocity field on a periodic grid."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from shodh_moe.kernels import curl, differentiation_matrix


@lru_cache(maxsize=16)
def _inverse_laplacian(shape: tuple[int, int, int], operator: str) -> Tensor:
    """1 / |k_D|^2 for every mode of a real transform, [X, Y, Z // 2 + 1], float64; 0 where k_D = 0."""
    k_x, k_y, k_z = (
        # A circulant matrix is diagonal in Fourier space; its first column transforms into its symbol: i k_D,
        # with a real k_D for the antisymmetric operators, a complex one for the staggered.
        torch.fft.fft(differentiation_matrix(size, operator, 1.0, torch.float64)[:, 0]).abs()
        for size in shape
    )
    k_z = k_z[: shape[2] // 2 + 1]
    square = k_x[:, None, None] ** 2 + k_y[None, :, None] ** 2 + k_z[None, None, :] ** 2
    return torch.where(square > 1e-12, 1 / square.clamp(min=1e-12), 0.0)


def vector_potential(u_B3XYZ: Tensor, operator: str = "spectral") -> Tensor:
    """A with curl_D(A) the divergence-free, zero-mean part of u: A = (-Laplace_D)^-1 curl_D^T(u), [B, 3, X, Y, Z].

    With D^T the transposed derivative, curl_D curl_D^T = -Laplace_D on divergence-free fields, where
    -Laplace_D = D_x D_x^T + D_y D_y^T + D_z D_z^T, and no other part of u returns. A is in the Coulomb gauge: its
    divergence taken with D^T is zero, which for the antisymmetric operators is div_D(A) = 0.
    Modes where every D vanishes (the mean; for even sizes and antisymmetric operators the Nyquist modes) have no
    potential.
    """
    rotation = curl(u_B3XYZ, operator=operator, adjoint=True)
    shape = (u_B3XYZ.shape[2], u_B3XYZ.shape[3], u_B3XYZ.shape[4])
    inverse = _inverse_laplacian(shape, operator).to(device=rotation.device, dtype=rotation.dtype)
    return torch.fft.irfftn(torch.fft.rfftn(rotation, dim=(2, 3, 4)) * inverse, s=shape, dim=(2, 3, 4))
