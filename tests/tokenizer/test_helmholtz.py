"""The vector potential reproduces divergence-free fields, in the Coulomb gauge, on any box."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shodh_moe.kernels import curl, divergence
from shodh_moe.kernels.differentiation import OPERATORS
from shodh_moe.tokenizer.helmholtz import at_centres, conserved_velocity, vector_potential
from tests.tokenizer.helpers import rms

BOXES = [(8, 8, 8), (7, 9, 11), (8, 9, 16), (16, 8, 4), (5, 5, 5), (2, 6, 3)]


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_divergence_free_field_comes_back(box: tuple[int, int, int], dtype: torch.dtype, rounding: float) -> None:
    u = curl(random((2, 3, *box), torch.float64)).to(dtype)
    assert rms(u) > 0.1
    back = curl(vector_potential(u))
    assert back.dtype == dtype
    assert rms(back - u) <= rounding * rms(u)


@pytest.mark.parametrize("box", BOXES)
def test_the_potential_is_in_the_coulomb_gauge(box: tuple[int, int, int]) -> None:
    potential = vector_potential(random((1, 3, *box), torch.float64))
    assert rms(potential) > 1e-3
    assert rms(divergence(potential)) <= 1e-12 * rms(curl(potential))


def test_mean_and_gradients_have_no_potential() -> None:
    x, y, z = torch.meshgrid(*[torch.arange(8, dtype=torch.float64) * (2 * torch.pi / 8)] * 3, indexing="ij")
    gradient = torch.stack([torch.cos(x), torch.cos(y), -2 * torch.sin(2 * z)])[None]  # of sin x + sin y + cos 2z
    assert rms(vector_potential(gradient + 3.0)) <= 1e-12


def test_a_known_potential() -> None:
    """u = (0, 0, cos x) is the curl of A = (0, sin x, 0)."""
    n = 16
    x = (torch.arange(n, dtype=torch.float64) * (2 * torch.pi / n))[:, None, None].expand(n, n, n)
    zero = torch.zeros_like(x)
    # The operator's grid spacing is 1, not 2 pi / n.
    expected = torch.stack([zero, torch.sin(x) * n / (2 * torch.pi), zero])[None]
    torch.testing.assert_close(vector_potential(torch.stack([zero, zero, torch.cos(x)])[None]), expected)


def test_only_the_divergence_free_part_of_a_field_returns() -> None:
    u = random((1, 3, 8, 9, 8), torch.float64)
    part = curl(vector_potential(u))
    assert rms(divergence(part)) <= 1e-12 * rms(part)
    torch.testing.assert_close(curl(vector_potential(part)), part)
    # The projection is orthogonal, so the rest is orthogonal to the result.
    assert abs(float(((u - part) * part).sum())) <= 1e-9 * float(u.square().sum())


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("box", [(8, 9, 16), (5, 6, 7)])
def test_every_operator_has_its_potential(operator: str, box: tuple[int, int, int]) -> None:
    u = random((2, 3, *box), torch.float64)
    part = curl(vector_potential(u, operator), operator=operator)
    assert rms(part) > 0.5  # about two thirds of the variance of u
    assert rms(divergence(part, operator)) <= 1e-12 * rms(part)
    assert part.mean(dim=(2, 3, 4)).abs().max() <= 1e-12
    torch.testing.assert_close(curl(vector_potential(part, operator), operator=operator), part)
    assert abs(float(((u - part) * part).sum())) <= 1e-9 * float(u.square().sum())


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_curl_comes_back_from_its_potential(operator: str) -> None:
    u = curl(random((1, 3, 8, 9, 10), torch.float64), operator=operator)
    torch.testing.assert_close(curl(vector_potential(u, operator), operator=operator), u)


@pytest.mark.parametrize("operator", OPERATORS)
def test_without_walls_it_is_a_curl_and_the_mean(operator: str) -> None:
    w, none = random((2, 3, 8, 9, 7), torch.float64) + 0.5, torch.zeros(2, 1, 8, 9, 7)
    u = conserved_velocity(w, none, operator, "none")
    torch.testing.assert_close(u.mean((2, 3, 4)), w.mean((2, 3, 4)))
    assert rms(divergence(u, operator)) <= 1e-13 * rms(u)
    torch.testing.assert_close(conserved_velocity(u, none, operator, "none") if operator != "staggered" else u, u)


def test_faces_and_back_is_of_fourth_order() -> None:
    """Interpolation to faces and back must preserve a smooth velocity, since its result is compared with data."""
    errors = []
    for n in (16, 32):
        angle = torch.arange(n, dtype=torch.float64) * (2 * torch.pi / n)
        x, y = angle[:, None, None].expand(n, n, n), angle[None, :, None].expand(n, n, n)
        # Taylor and Green's vortices, and a shear.
        u = torch.stack([x.sin() * y.cos(), -x.cos() * y.sin(), x.sin() + y.cos()])[None]
        back = at_centres(conserved_velocity(u, torch.zeros(1, 1, n, n, n), "staggered", "exact"), "staggered")
        errors.append(rms(back - u) / rms(u))
    assert errors[1] < 1e-3
    assert errors[0] / errors[1] > 14


def test_tensors_cached_in_inference_allow_gradients() -> None:
    w = random((1, 3, 6, 7, 9), torch.float64)
    with torch.inference_mode():
        vector_potential(w)
    vector_potential(w.requires_grad_()).sum().backward()
    assert w.grad is not None
