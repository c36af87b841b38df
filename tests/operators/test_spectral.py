"""The truncated transform against torch's FFT."""

from __future__ import annotations

import pytest
import torch

from shodh_moe.operators.spectral import _matrices, from_modes, to_modes, wavenumbers

GRIDS = [(16, 16, 4), (12, 20, 6), (15, 9, 3), (8, 8, 4), (8, 6, 32), (7, 5, 32)]


@pytest.mark.parametrize(("h", "w", "modes"), GRIDS)
def test_the_coefficients_equal_those_of_the_fft(h: int, w: int, modes: int) -> None:
    x = torch.randn(2, h, w, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k_h, k_w = wavenumbers(h, w, modes)
    full = torch.fft.fft2(x, dim=(1, 2), norm="forward")
    expected = full[:, k_h][:, :, k_w].permute(1, 2, 0, 3)
    torch.testing.assert_close(to_modes(x, modes), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("h", "w", "modes"), GRIDS)
def test_the_inverse_equals_the_inverse_fft_of_the_kept_coefficients(h: int, w: int, modes: int) -> None:
    k_h, k_w = wavenumbers(h, w, modes)
    g = torch.Generator().manual_seed(0)
    z = torch.randn(len(k_h), len(k_w), 2, 3, generator=g, dtype=torch.complex128)
    full = torch.zeros(2, h, w // 2 + 1, 3, dtype=torch.complex128)
    full[:, torch.tensor(k_h)[:, None], torch.tensor(k_w)] = z.permute(2, 0, 1, 3)
    # One axis after the other: torch does not specify the two-dimensional inverse of such a spectrum.
    columns = torch.fft.ifft(full, dim=1, norm="forward")
    columns[:, :, 0] = columns[:, :, 0].real + 0j
    if w % 2 == 0:
        columns[:, :, w // 2] = columns[:, :, w // 2].real + 0j
    expected = torch.fft.irfft(columns, n=w, dim=2, norm="forward")
    torch.testing.assert_close(from_modes(z, h, w, modes), expected, rtol=0, atol=1e-12)


def test_all_modes_reproduce_the_field() -> None:
    x = torch.randn(2, 8, 7, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(from_modes(to_modes(x, 32), 8, 7, 32), x)


def test_matrices_made_in_inference_mode_allow_training() -> None:
    _matrices.cache_clear()
    x = torch.randn(1, 8, 8, 2)
    with torch.inference_mode():
        to_modes(x, 3)
    to_modes(x.requires_grad_(), 3).abs().sum().backward()
    assert x.grad is not None
