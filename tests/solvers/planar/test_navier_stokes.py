"""Navier-Stokes against exact flows, conservation, convergence, and its promises."""

from __future__ import annotations

import math

import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.solvers import DivergedError
from shodh_moe.solvers.planar import exact
from shodh_moe.solvers.planar.navier_stokes import NavierStokes, forcing, random_initial, simulate
from tests.solvers.planar.helpers import relative_difference, seeds

VISCOSITY = torch.tensor([1e-4, 1e-3, 1e-2], dtype=torch.float64)
FREE = NavierStokes(forcing=0.0)


@pytest.mark.parametrize("side", [1.0, 2 * math.pi])
def test_taylor_green_vortices_decay_exactly_at_every_viscosity(side: float) -> None:
    settings = NavierStokes(side=side, forcing=0.0)
    initial = exact.taylor_green(24, side, 2, VISCOSITY, 0.0).expand(3, -1, -1, -1)
    found = simulate(initial, VISCOSITY, 4, 1.0, settings)
    for snapshot in range(4):
        expected = exact.taylor_green(24, side, 2, VISCOSITY, float(snapshot))
        torch.testing.assert_close(found[:, snapshot], expected, rtol=0, atol=1e-13)


def test_a_forced_flow_at_rest_follows_its_exact_solution_at_every_viscosity() -> None:
    settings = NavierStokes()
    found = simulate(torch.zeros(3, 1, 24, 24, dtype=torch.float64), VISCOSITY, 3, 2.0, settings)
    expected = exact.forced_shear(forcing(settings, 24, 24), 1.0, VISCOSITY, 4.0)
    torch.testing.assert_close(found[:, -1], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(32, 32), (24, 36)])
def test_a_steadily_forced_flow_stays_steady(shape: tuple[int, int]) -> None:
    """w = a cos(kx) + b cos(2ky): advection, viscosity and force balance; signs and factors all count."""
    k, a, b, viscosity = 2 * math.pi, 0.7, -0.4, 2e-3
    x = k / shape[1] * torch.arange(shape[1], dtype=torch.float64)
    y = k / shape[0] * torch.arange(shape[0], dtype=torch.float64)[:, None]
    vorticity = a * torch.cos(x) + b * torch.cos(2 * y)
    advection = -1.5 * a * b * torch.sin(x) * torch.sin(2 * y)
    force = advection + viscosity * k**2 * (a * torch.cos(x) + 4 * b * torch.cos(2 * y))
    viscosity_B = torch.tensor([viscosity], dtype=torch.float64)
    found = simulate(vorticity[None, None], viscosity_B, 3, 0.5, FREE, force)
    torch.testing.assert_close(found[0, -1, 0], vorticity, rtol=0, atol=1e-12)
    wrong = simulate(
        vorticity[None, None], torch.tensor([viscosity], dtype=torch.float64), 3, 0.5, FREE, force - 2 * advection
    )
    assert relative_difference(wrong[0, -1, 0], vorticity) > 0.05


def test_energy_and_enstrophy_are_conserved_without_viscosity() -> None:
    """This holds only with dealiased products; the remaining error is that of the time step."""
    found = simulate(random_initial(seeds(2), 48), torch.full((2,), 1e-15), 3, 1.0, FREE)[:, :, 0]
    series, waves = torch.fft.fft2(found).abs().square(), torch.fft.fftfreq(48, 1 / 48, dtype=torch.float64)
    k2 = waves[:, None] ** 2 + waves**2
    k2[0, 0] = 1.0
    for quantity in (series, series / k2):
        total = quantity.sum((2, 3))
        assert float((total[:, -1] / total[:, 0] - 1).abs().max()) < 1e-6


def test_enstrophy_budget_closes() -> None:
    """d/dt <w^2>/2 = <f w> - nu <|grad w|^2>, by Simpson's rule over one interval."""
    settings, viscosity = NavierStokes(), torch.tensor([5e-4, 2e-3], dtype=torch.float64)
    found = simulate(random_initial(seeds(2), 48), viscosity, 41, 0.02, settings)[:, :, 0]
    waves = 2 * math.pi * torch.fft.fftfreq(48, 1 / 48, dtype=torch.float64)
    k2 = waves[:, None] ** 2 + waves**2
    palinstrophy = (k2 * torch.fft.fft2(found).abs().square()).sum((2, 3)) / 48**4
    gain = (found * forcing(settings, 48, 48)).mean((2, 3)) - viscosity[:, None] * palinstrophy
    weights = torch.tensor([1.0] + [4.0, 2.0] * 19 + [4.0, 1.0], dtype=torch.float64) * 0.02 / 3
    half = 0.5 * found.square().mean((2, 3))
    torch.testing.assert_close(half[:, -1] - half[:, 0], (gain * weights).sum(1), rtol=1e-5, atol=0)


def test_time_steps_converge_at_fourth_order_and_the_default_is_fine_enough() -> None:
    initial, ends = random_initial(seeds(2), 48), []
    for step in (0.02, 0.01, 0.0025):
        ends.append(simulate(initial, VISCOSITY[:2], 2, 0.8, NavierStokes(step=step))[:, -1])
    coarse, fine = relative_difference(ends[0], ends[2]), relative_difference(ends[1], ends[2])
    assert coarse < 1e-5
    assert 12 < coarse / fine < 20


def test_grids_converge_spectrally() -> None:
    ends = [simulate(random_initial(seeds(1), n), VISCOSITY[1:2], 2, 1.0)[0, -1, 0] for n in (40, 60, 120)]
    # Points of the coarser grids are points of the finest.
    errors = [relative_difference(ends[0], ends[2][::3, ::3]), relative_difference(ends[1], ends[2][::2, ::2])]
    assert errors[0] < 1e-2
    assert errors[1] < errors[0] / 20


def test_initial_vorticity_is_the_same_function_on_every_grid() -> None:
    coarse, fine = (random_initial(seeds(8), grid) for grid in (40, 80))
    torch.testing.assert_close(coarse, fine[..., ::2, ::2], rtol=0, atol=1e-12)
    assert 0.8 < float(fine.std()) < 1.2
    assert float(fine.mean((-2, -1)).abs().max()) < 1e-14


def test_float32_agrees_with_float64() -> None:
    initial = random_initial(seeds(2), 40)
    ends = [simulate(initial.to(dtype), VISCOSITY[:2], 4, 0.5)[:, -1] for dtype in (torch.float32, torch.float64)]
    assert ends[0].dtype == torch.float32
    assert relative_difference(ends[0], ends[1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_trajectory_is_bit_identical_in_any_batch(dtype: torch.dtype) -> None:
    initial, viscosity = random_initial(seeds(5), 48).to(dtype), torch.linspace(2e-4, 2e-3, 5)
    together = simulate(initial, viscosity, 3, 0.2)
    for index in range(5):
        alone = random_initial(seeds(1, index), 48).to(dtype)
        torch.testing.assert_close(
            together[index], simulate(alone, viscosity[index : index + 1], 3, 0.2)[0], rtol=0, atol=0
        )
    torch.testing.assert_close(together[1:4], simulate(initial[1:4], viscosity[1:4], 3, 0.2), rtol=0, atol=0)


def test_a_step_that_is_too_long_names_the_trajectory_and_a_sufficient_step() -> None:
    initial = random_initial(seeds(3), 40)
    initial[2] *= 10
    with pytest.raises(DivergedError, match=r"trajectory 2 of 3 is too fast at time 0 .* at most 0\.00"):
        simulate(initial, VISCOSITY, 2, 0.5)


def test_invalid_input_is_refused() -> None:
    with pytest.raises(UserError, match="viscosity of trajectory 1 is 0"):
        simulate(torch.zeros(2, 1, 8, 8), torch.tensor([1.0, 0.0]), 2, 0.5)
    with pytest.raises(UserError, match="shape"):
        simulate(torch.zeros(2, 8, 8), torch.ones(2), 2, 0.5)
    with pytest.raises(UserError, match="larger than 36"):
        random_initial(seeds(1), 36)
