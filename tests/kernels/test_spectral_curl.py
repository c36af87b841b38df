"""Curl and divergence: analytic fields, exact mass conservation, self-adjointness."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shodh_moe.kernels import curl, differentiation_matrix, divergence


@pytest.mark.parametrize("size", [15, 16, 32])
def test_matrix_differentiates_fourier_modes_exactly(size):
    x = torch.arange(size, dtype=torch.float64) * (2 * math.pi / size)
    d = differentiation_matrix(size, "spectral", 2 * math.pi / size, torch.float64)
    for k in range((size - 1) // 2 + 1):
        torch.testing.assert_close(d @ torch.sin(k * x), k * torch.cos(k * x), atol=1e-11, rtol=0)
    assert torch.equal(d, -d.T)


def test_nyquist_derivative_is_zero():
    d = differentiation_matrix(16, "spectral", 1.0, torch.float64)
    assert (d @ torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(8)).abs().max() < 1e-13


def test_curl_of_a_known_potential():
    """A = (0, 0, sin x cos y) has the Taylor-Green velocity (-sin x sin y, -cos x cos y, 0)."""
    n = 16
    h = 2 * math.pi / n
    x, y, _ = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) * h] * 3, indexing="ij")
    a = torch.zeros(1, 3, n, n, n, dtype=torch.float64)
    a[0, 2] = torch.sin(x) * torch.cos(y)
    u = curl(a, torch.tensor([[0.5, 0.0, -1.0]], dtype=torch.float64), spacing=h)
    expected = torch.stack([-torch.sin(x) * torch.sin(y) + 0.5, -torch.cos(x) * torch.cos(y), torch.full_like(x, -1.0)])
    torch.testing.assert_close(u[0], expected, atol=1e-12, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.tuples(*[st.integers(4, 20)] * 3), st.floats(0.1, 10), st.integers(0, 2**16))
def test_divergence_of_a_curl_vanishes(shape, spacing, seed):
    a = torch.randn(2, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    u = curl(a, torch.ones(2, 3, dtype=torch.float64), spacing=spacing)
    relative = spacing * divergence(u, spacing=spacing).square().mean().sqrt() / u.square().mean().sqrt()
    assert relative < 1e-13


def test_divergence_sees_a_compressive_flow():
    """The zero above is no artefact: u = (sin x, 0, 0) has divergence cos x."""
    n = 16
    h = 2 * math.pi / n
    u = torch.zeros(1, 3, n, n, n, dtype=torch.float64)
    x = torch.arange(n, dtype=torch.float64) * h
    u[0, 0] = torch.sin(x)[:, None, None]
    torch.testing.assert_close(divergence(u, spacing=h)[0, :, 0, 0], torch.cos(x), atol=1e-12, rtol=0)


def test_curl_is_its_own_adjoint():
    torch.manual_seed(0)
    a, b = (torch.randn(1, 3, 8, 10, 9, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close((curl(a) * b).sum(), (a * curl(b)).sum())


def test_gradcheck():
    a = torch.randn(1, 3, 4, 4, 6, dtype=torch.float64, requires_grad=True)
    mean = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(curl, (a, mean))
    assert torch.autograd.gradcheck(divergence, (a,))


def test_unknown_operator_raises():
    with pytest.raises(ValueError, match="unknown derivative operator 'upwind'"):
        curl(torch.zeros(1, 3, 4, 4, 4), operator="upwind")
