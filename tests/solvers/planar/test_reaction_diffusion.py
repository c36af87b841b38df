"""FitzHugh-Nagumo against exact linear modes, an exact reaction, another method, and its promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from shodh_moe.base.errors import UserError
from shodh_moe.solvers import DivergedError
from shodh_moe.solvers.planar import exact
from shodh_moe.solvers.planar.reaction_diffusion import ReactionDiffusion, cosines, random_initial, simulate
from tests.solvers.planar.helpers import relative_difference, seeds

DIFFUSIVITY = torch.tensor([2e-3, 6e-3, 2e-2], dtype=torch.float64)


@pytest.mark.parametrize("mode", [(0, 0), (1, 0), (3, 5), (11, 2)])
def test_small_modes_follow_the_exact_linear_solution_at_every_diffusivity(mode: tuple[int, int]) -> None:
    side, time, start = 2.0, 1.5, (1.0, -0.5)
    x = np.pi * (np.arange(24) + 0.5) / 24
    shape = torch.from_numpy(np.cos(mode[0] * x)[:, None] * np.cos(mode[1] * x))
    initial = 1e-6 * torch.stack((start[0] * shape, start[1] * shape)).expand(3, -1, -1, -1)
    found = simulate(initial, DIFFUSIVITY, 2, time, ReactionDiffusion(threshold=0.0))[:, -1]
    for row, diffusivity in zip(found, DIFFUSIVITY.tolist(), strict=True):
        amplitudes = exact.linear_modes(*mode, side, (diffusivity, 5e-3), start, time)
        torch.testing.assert_close(row, 1e-6 * amplitudes[:, None, None] * shape, rtol=0, atol=1e-13)


def test_uniform_fields_follow_only_the_reaction() -> None:
    initial = torch.tensor([0.8, -0.3], dtype=torch.float64)[None, :, None, None].expand(3, -1, 4, 6)
    found = simulate(initial, DIFFUSIVITY, 3, 1.0)
    solution = solve_ivp(
        lambda _, y: (y[0] - y[0] ** 3 - 5e-3 - y[1], y[0] - y[1]), (0, 2), (0.8, -0.3), rtol=1e-12, atol=1e-12
    )
    expected = torch.from_numpy(solution.y[:, -1])[:, None, None].expand(2, 4, 6)
    torch.testing.assert_close(found[:, -1], expected.expand(3, -1, -1, -1), rtol=0, atol=1e-7)


def test_five_point_differences_converge_to_the_solution_at_second_order() -> None:
    """The method of PDEBench's own generator: a five-point Laplacian and an adaptive Runge-Kutta method."""
    settings, errors = ReactionDiffusion(initial_modes=5, initial_length=0.6), []
    for grid in (16, 32):
        initial = random_initial(seeds(1), grid, settings)
        ours = simulate(initial, torch.tensor([6e-3]), 2, 1.0, settings)[0, -1].numpy()

        def rate(_: float, flat: np.ndarray, grid: int = grid) -> np.ndarray:
            u, v = fields = flat.reshape(2, grid, grid)
            padded = np.pad(fields, ((0, 0), (1, 1), (1, 1)), "edge")
            around = padded[:, 2:, 1:-1] + padded[:, :-2, 1:-1] + padded[:, 1:-1, 2:] + padded[:, 1:-1, :-2]
            laplace = (around - 4 * fields) * (grid / 2.0) ** 2
            return np.stack((6e-3 * laplace[0] + u - u**3 - 5e-3 - v, 5e-3 * laplace[1] + u - v)).ravel()

        theirs = solve_ivp(rate, (0, 1), initial.numpy().ravel(), rtol=1e-9, atol=1e-9).y[:, -1].reshape(ours.shape)
        errors.append(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))
    assert errors[1] < 2e-3
    assert 3.5 < errors[0] / errors[1] < 4.7


def test_time_steps_converge_at_fourth_order_and_the_default_is_fine_enough() -> None:
    initial, ends = random_initial(seeds(3), 32), []
    for step in (0.02, 0.01, 0.00125):
        ends.append(simulate(initial, DIFFUSIVITY, 2, 0.2, ReactionDiffusion(step=step))[:, -1])
    coarse, fine = relative_difference(ends[0], ends[2]), relative_difference(ends[1], ends[2])
    assert coarse < 1e-5
    assert 12 < coarse / fine < 30


def test_cosine_transform_is_orthonormal() -> None:
    matrix = cosines(37)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(37, dtype=torch.float64), rtol=0, atol=1e-13)


def test_initial_fields_are_the_same_function_on_every_grid_and_of_unit_variance() -> None:
    coarse, fine = (random_initial(seeds(8), grid) for grid in (32, 96))
    # Cell centres of the coarse grid are also cell centres of a grid three times as fine.
    torch.testing.assert_close(coarse, fine[..., 1::3, 1::3], rtol=0, atol=1e-12)
    assert 0.8 < float(fine.std()) < 1.2


def test_float32_agrees_with_float64() -> None:
    initial = random_initial(seeds(2), 32)
    ends = [simulate(initial.to(dtype), DIFFUSIVITY[:2], 6, 0.25)[:, -1] for dtype in (torch.float32, torch.float64)]
    assert ends[0].dtype == torch.float32
    assert relative_difference(ends[0], ends[1]) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_trajectory_is_bit_identical_in_any_batch(dtype: torch.dtype) -> None:
    initial = random_initial(seeds(5), 32).to(dtype)
    rates = torch.linspace(2e-3, 6e-3, 5)
    together = simulate(initial, rates, 3, 0.25)
    for index in range(5):
        torch.testing.assert_close(together[index], random_alone(index, rates, dtype), rtol=0, atol=0)
    torch.testing.assert_close(together[1:4], simulate(initial[1:4], rates[1:4], 3, 0.25), rtol=0, atol=0)


def random_alone(index: int, rates: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return simulate(random_initial(seeds(1, index), 32).to(dtype), rates[index : index + 1], 3, 0.25)[0]


def test_instability_names_the_trajectory_and_a_sufficient_step() -> None:
    initial = random_initial(seeds(3), 32)
    initial[1] *= 4
    with pytest.raises(DivergedError, match=r"trajectory 1 of 3 reacts too fast at time 0 .* at most 0\.0"):
        simulate(initial, DIFFUSIVITY, 2, 0.5)


@pytest.mark.parametrize(
    ("initial", "rates", "message"),
    [
        (torch.zeros(2, 1, 8, 8), torch.ones(2), "shape"),
        (torch.zeros(2, 2, 8, 8), torch.ones(3), "diffusivity has shape"),
        (torch.zeros(2, 2, 8, 8), torch.tensor([1.0, -1.0]), "diffusivity of trajectory 1 is -1"),
        (torch.full((1, 2, 8, 8), torch.nan), torch.ones(1), "trajectory 0 are not finite"),
        (torch.zeros(1, 2, 8, 8, dtype=torch.int64), torch.ones(1), "float32 or float64"),
    ],
)
def test_invalid_input_is_refused(initial: torch.Tensor, rates: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        simulate(initial, rates, 2, 0.5)


def test_invalid_settings_are_refused() -> None:
    for settings, snapshots, interval in ((ReactionDiffusion(step=0.0), 2, 0.5), (None, 0, 0.5), (None, 2, -1.0)):
        with pytest.raises(UserError):
            simulate(torch.zeros(1, 2, 8, 8), torch.ones(1), snapshots, interval, settings)
    with pytest.raises(UserError, match="too coarse"):
        random_initial(seeds(1), 16)
