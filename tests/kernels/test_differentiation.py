"""Differentiation matrices: exact on Fourier modes, of the stated order, antisymmetric, with correct positions."""

from __future__ import annotations

import math

import pytest
import torch

from shodh_moe.kernels import curl, differentiation_matrix, divergence
from shodh_moe.kernels.differentiation import MINIMUM, OPERATORS, cached_matrix


@pytest.mark.parametrize("size", [15, 16, 32])
def test_spectral_differentiates_fourier_modes_exactly(size: int) -> None:
    x = torch.arange(size, dtype=torch.float64) * (2 * math.pi / size)
    d = differentiation_matrix(size, "spectral", 2 * math.pi / size, torch.float64)
    for k in range((size - 1) // 2 + 1):
        torch.testing.assert_close(d @ torch.sin(k * x), k * torch.cos(k * x), atol=1e-11, rtol=0)


def test_nyquist_derivative_is_zero() -> None:
    d = differentiation_matrix(16, "spectral", 1.0, torch.float64)
    assert (d @ torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(8)).abs().max() < 1e-13


@pytest.mark.parametrize(("operator", "order"), [("central2", 2), ("central4", 4), ("staggered", 2)])
def test_order_of_accuracy(operator: str, order: int) -> None:
    def error(size: int) -> float:
        h = 2 * math.pi / size
        x = torch.arange(size, dtype=torch.float64) * h
        at = x + h / 2 if operator == "staggered" else x  # between the two points
        d = differentiation_matrix(size, operator, h, torch.float64)
        return float((d @ torch.sin(x) - torch.cos(at)).abs().max())

    assert math.log2(error(32) / error(64)) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 9])
def test_matrices_are_circulant_and_antisymmetric(operator: str, size: int) -> None:
    if size < MINIMUM[operator]:
        with pytest.raises(ValueError, match=f"size is {size}: the operator '{operator}' needs at least"):
            differentiation_matrix(size, operator, 1.0, torch.float64)
        return
    d = differentiation_matrix(size, operator, 0.5, torch.float64)
    assert torch.equal(d, d.roll((1, 1), dims=(0, 1))) or operator == "spectral"
    torch.testing.assert_close(d, d.roll((1, 1), dims=(0, 1)))  # circulant
    torch.testing.assert_close(d.sum(dim=1), torch.zeros(size, dtype=torch.float64), atol=1e-13, rtol=0)
    if operator != "staggered":
        assert torch.equal(d, -d.T)
    minus_transposed = cached_matrix(size, operator, 0.5, torch.float64, torch.device("cpu"), adjoint=True)
    assert torch.equal(minus_transposed, -d.T)


def test_the_caller_owns_the_matrix() -> None:
    differentiation_matrix(8, "central2", 1.0, torch.float32).zero_()
    assert differentiation_matrix(8, "central2", 1.0, torch.float32).any()


def test_staggered_positions() -> None:
    """For u = curl(0, 0, sin x cos y): A on edges, u on faces and the divergence at centres have the exact values."""
    n = 64
    h = 2 * math.pi / n
    i = torch.arange(n, dtype=torch.float64)
    x, y = i[:, None] * h, i[None, :] * h
    a = torch.zeros(1, 3, n, n, 2, dtype=torch.float64)
    a[0, 2] = (torch.sin(x) * torch.cos(y))[..., None]  # A_z sits at (i, j, k + 1/2)
    u = curl(a, operator="staggered", spacing=h)[0, ..., 0]
    bound = 1.01 * h**2 / 24  # error of a centred difference of sin
    assert (u[0] + torch.sin(x) * torch.sin(y + h / 2)).abs().max() <= bound  # u_x at (i, j + 1/2)
    assert (u[1] + torch.cos(x + h / 2) * torch.cos(y)).abs().max() <= bound  # u_y at (i + 1/2, j)


def test_backward_differences_do_not_see_a_staggered_curl_as_solenoidal() -> None:
    """Both must be forward: a backward divergence belongs to faces numbered the other way."""
    a = torch.randn(1, 3, 8, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = curl(a, operator="staggered")
    backward = sum(u[:, axis] - u[:, axis].roll(1, dims=1 + axis) for axis in range(3))
    assert divergence(u, "staggered").abs().max() <= 1e-13
    assert backward.abs().max() > 1


@pytest.mark.parametrize("spacing", [0.0, -1.0, math.inf, math.nan])
def test_an_invalid_spacing_is_refused(spacing: float) -> None:
    with pytest.raises(ValueError, match="spacing must be positive and finite"):
        differentiation_matrix(8, "central2", spacing, torch.float32)


def test_unknown_operator() -> None:
    with pytest.raises(ValueError, match="unknown derivative operator 'upwind'; known: spectral, central2"):
        differentiation_matrix(8, "upwind", 1.0, torch.float32)
