"""The inverse Laplacian of a derivative operator, on the periodic box without solids."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from shodh_moe.kernels import differentiation_matrix


@lru_cache(maxsize=16)
def inverse_laplacian(shape: tuple[int, int, int], operator: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return 1 / |k_D|^2 for every mode of a real transform, [X, Y, Z // 2 + 1], in ``dtype``; 0 where k_D = 0.

    It is computed in float64. The result is cached, so callers must not write to it.
    """
    with torch.inference_mode(False), torch.no_grad():
        k_x, k_y, k_z = (
            # A circulant matrix is diagonal in Fourier space; its first column transforms into its symbol: i k_D,
            # with a real k_D for the antisymmetric operators, a complex one for the staggered.
            torch.fft.fft(differentiation_matrix(size, operator, 1.0, torch.float64)[:, 0]).abs()
            for size in shape
        )
        k_z = k_z[: shape[2] // 2 + 1]
        square = k_x[:, None, None] ** 2 + k_y[None, :, None] ** 2 + k_z[None, None, :] ** 2
        return torch.where(square > 1e-12, 1 / square.clamp(min=1e-12), 0.0).to(device=device, dtype=dtype)
