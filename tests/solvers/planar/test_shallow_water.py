"""Shallow water against exact dam breaks, conservation, symmetry, convergence, and its promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.solvers import DivergedError
from shodh_moe.solvers.planar import exact
from shodh_moe.solvers.planar.shallow_water import ShallowWater, random_initial, simulate
from tests.solvers.planar.helpers import seeds

SIDE, TIME = 10.0, 1.5
LINE = ShallowWater(side=SIDE)


def points(cells: int) -> torch.Tensor:
    """Eight points in each cell of a line around 0."""
    return (torch.arange(8 * cells, dtype=torch.float64) + 0.5) * SIDE / (8 * cells) - SIDE / 2


def means(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 8).mean(1)


def channel(depth: torch.Tensor, momentum: torch.Tensor | float = 0.0, axis: int = 3) -> torch.Tensor:
    """A state that varies along one axis, [1, 3, ...]."""
    state = torch.zeros(1, 3, 4, len(depth), dtype=torch.float64)
    state[:, 0], state[:, 1] = depth, momentum
    return state if axis == 3 else state[:, [0, 2, 1]].mT.contiguous()


def run(initial: torch.Tensor, time: float = TIME, settings: ShallowWater = LINE, gravity: float = 1.0) -> torch.Tensor:
    return simulate(initial, torch.full((len(initial),), gravity), 2, time, settings)[:, -1]


def dam_error(cells: int, left: float, right: float, gravity: float = 1.0, axis: int = 3) -> tuple[float, float]:
    """Mean error of depth and momentum of a dam break along one axis, in units of the depth's jump."""
    x = points(cells)
    initial = channel(means(torch.where(x < 0, left, right)), axis=axis)
    found = run(initial, TIME / math.sqrt(gravity), gravity=gravity)
    found = found if axis == 3 else found.mT[:, [0, 2, 1]]
    time = TIME / math.sqrt(gravity)
    h, u = exact.stoker(x, time, left, right, gravity) if right else exact.ritter(x, time, left, gravity)
    torch.testing.assert_close(found, found[:, :, :1].expand_as(found), rtol=0, atol=1e-13)
    assert float(found[:, 2].abs().max()) == 0.0
    errors = (found[0, 0, 0] - means(h)).abs().mean(), (found[0, 1, 0] - means(h * u)).abs().mean()
    return float(errors[0]) / (left - right), float(errors[1]) / (left - right)


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize(("left", "right"), [(2.0, 1.0), (2.0, 0.1), (1.0, 0.0)])
def test_dam_breaks_approach_the_exact_solution(left: float, right: float, axis: int) -> None:
    coarse, fine = dam_error(50, left, right, axis=axis), dam_error(200, left, right, axis=axis)
    assert fine[0] < 0.004
    assert fine[1] < 0.006
    assert fine[0] < coarse[0] / 3
    assert fine[1] < coarse[1] / 3


@pytest.mark.parametrize("right", [1.0, 0.0])
def test_a_mirrored_dam_break_is_the_mirror_image(right: float) -> None:
    x = points(100)
    initial = channel(means(torch.where(x < 0, 2.0, right)))
    found, mirrored = run(initial), run(initial.flip(3)).flip(3)
    mirrored[:, 1] = -mirrored[:, 1]
    torch.testing.assert_close(found, mirrored, rtol=0, atol=1e-13)


def test_gravity_only_scales_time() -> None:
    """With u in units of sqrt(g): the same depths at sqrt(g) times the time."""
    assert dam_error(50, 2.0, 0.5, gravity=4.0)[0] == pytest.approx(dam_error(50, 2.0, 0.5)[0], rel=1e-9)


def test_a_transonic_rarefaction_has_no_jump() -> None:
    """Where u = sqrt(g h), at the dam of a dry-bed break, a solver without entropy condition leaves a step."""
    x = points(200)
    depth = run(channel(means(torch.where(x < 0, 1.0, 0.0))))[0, 0, 0]
    jumps = depth.diff()[80:120].abs()
    h, _ = exact.ritter(x, TIME, 1.0, 1.0)
    torch.testing.assert_close(jumps, means(h).diff()[80:120].abs(), rtol=0.1, atol=0)


def test_smooth_waves_converge_at_second_order() -> None:
    errors = []
    for cells in (100, 200, 400):
        x = points(cells)
        h, u = exact.simple_wave(x, 0.0, 1.0, 0.1, 1.0)
        found = run(channel(means(h), means(h * u)))[0, 0, 0]
        errors.append(float((found - means(exact.simple_wave(x, TIME, 1.0, 0.1, 1.0)[0])).abs().mean()))
    assert errors[2] < 2e-5
    assert errors[0] / errors[1] > 3.3
    assert errors[1] / errors[2] > 3.5


def test_radial_dam_break_approaches_the_equations_in_r() -> None:
    r, h = exact.radial_dam_break(2.0, 1.0, 0.5, 1.0, 1.0, cells=3000)
    errors, rings = [], []
    for cells in (32, 96):
        x = (torch.arange(8 * cells, dtype=torch.float64) + 0.5) * 5 / (8 * cells) - 2.5
        share = ((x**2 + x[:, None] ** 2) <= 0.25).double().view(cells, 8, cells, 8).mean((1, 3))
        initial = torch.zeros(1, 3, cells, cells, dtype=torch.float64)
        initial[:, 0] = 1 + share
        depth = simulate(initial, torch.ones(1), 2, 1.0)[0, -1, 0]
        for same in (depth.flip(0), depth.flip(1), depth.mT):
            torch.testing.assert_close(depth, same, rtol=0, atol=1e-12)
        radius = torch.sqrt(means(x) ** 2 + means(x)[:, None] ** 2)
        expected = torch.from_numpy(np.interp(radius, r, h))
        errors.append(float((depth - expected).abs().mean() / (expected - 1).abs().mean()))
        half = slice(cells // 2, None)
        at = np.linspace(0.1, 2.0, 200)
        straight = np.interp(at, radius[cells // 2, half], depth[cells // 2, half])
        slanted = np.interp(at, radius.diagonal()[half], depth.diagonal()[half])
        rings.append(np.abs(straight - slanted).mean())
    assert errors[1] < 0.09
    assert errors[1] < 0.4 * errors[0]
    # Profiles along the axes and along the diagonals: their mean difference, in units of the jump at the dam.
    assert rings[1] < 0.006


@pytest.mark.parametrize("outer", [1.0, 0.0])
def test_mass_is_conserved_between_walls_and_depths_stay_non_negative(outer: float) -> None:
    settings = ShallowWater(walls="reflective", outer_height=outer)
    initial = random_initial(seeds(2), torch.tensor([1.5, 2.5]), 32, settings)
    # Long enough for the waves to cross the square.
    found = simulate(initial, torch.ones(2), 4, 1.5, settings)
    mass = found[:, :, 0].sum((2, 3))
    torch.testing.assert_close(mass, mass[:, :1].expand_as(mass), rtol=1e-13, atol=0)
    assert float(found[:, :, 0].min()) >= 0.0
    assert float((found[:, 0] - found[:, -1]).abs().max()) > 0.1


def test_water_at_rest_stays_at_rest() -> None:
    initial = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    initial[0, 0] = 1.7
    for walls in ("reflective", "outflow"):
        found = simulate(initial, torch.ones(2), 3, 1.0, ShallowWater(walls=walls))
        torch.testing.assert_close(found, initial[:, None].expand_as(found), rtol=0, atol=0)


def test_waves_leave_through_open_sides_and_stay_between_walls() -> None:
    initial = random_initial(seeds(1), torch.tensor([2.0]), 32)
    left, kept = (
        simulate(initial, torch.ones(1), 2, 12.0, ShallowWater(walls=walls))[0, -1, 0].std()
        for walls in ("outflow", "reflective")
    )
    assert float(left) < 0.3 * float(kept)


def test_the_courant_number_gives_an_error_below_that_of_the_grid() -> None:
    initial = random_initial(seeds(2), torch.tensor([1.5, 2.5]), 32)
    ends = [run(initial, 1.0, ShallowWater(courant=courant))[:, 0] for courant in (0.4, 0.2, 0.025)]
    errors = [float((end - ends[2]).norm() / (ends[2] - 1).norm()) for end in ends[:2]]
    assert errors[0] < 0.02
    assert errors[1] < 0.6 * errors[0]


def test_random_dams_have_the_configured_height_radius_and_position() -> None:
    fields = random_initial(seeds(6), torch.full((6,), 3.0), 64)
    water = (fields[:, 0] - 1).sum((1, 2)) * (5 / 64) ** 2 / 2
    radius = torch.sqrt(water / math.pi)
    assert float(radius.min()) > 0.49
    assert float(radius.max()) < 1.01
    assert len(set(radius.tolist())) == 6
    assert float(fields[:, 0].amax()) == 3.0
    assert not fields[:, 1:].any()
    coarse = random_initial(seeds(6), torch.full((6,), 3.0), 32)
    torch.testing.assert_close(coarse[:, 0], torch.nn.functional.avg_pool2d(fields[:, 0], 2), rtol=0, atol=0.2)


def test_float32_agrees_with_float64() -> None:
    initial = random_initial(seeds(2), torch.tensor([1.5, 2.5]), 32)
    single, double = (run(initial.to(dtype), 1.0) for dtype in (torch.float32, torch.float64))
    assert single.dtype == torch.float32
    assert float((single - double).norm() / double.norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_trajectory_is_bit_identical_in_any_batch(dtype: torch.dtype) -> None:
    heights = torch.linspace(1.2, 4.0, 5)
    initial, gravity = random_initial(seeds(5), heights, 24).to(dtype), torch.linspace(0.5, 3.0, 5)
    together = simulate(initial, gravity, 3, 0.3)
    for index in range(5):
        alone = random_initial(seeds(1, index), heights[index : index + 1], 24).to(dtype)
        torch.testing.assert_close(
            together[index], simulate(alone, gravity[index : index + 1], 3, 0.3)[0], rtol=0, atol=0
        )


def test_waves_that_are_too_fast_are_named() -> None:
    initial = random_initial(seeds(3), torch.full((3,), 2.0), 16)
    initial[1, 1] = 1e12
    with pytest.raises(DivergedError, match="trajectory 1 of 3"):
        simulate(initial, torch.ones(3), 2, 1.0)


def test_invalid_input_is_refused() -> None:
    good = torch.ones(2, 3, 8, 8)
    bad = good.clone()
    bad[1, 0, 3, 3] = -0.1
    for initial, gravity, settings, message in (
        (bad, torch.ones(2), None, "trajectory 1 has a negative depth"),
        (good, torch.tensor([1.0, -9.8]), None, "gravity of trajectory 1"),
        (good, torch.ones(2), ShallowWater(courant=0.9), "courant is 0.9"),
        (good, torch.ones(2), ShallowWater(walls="periodic"), "walls are 'periodic'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError, match=message):
            simulate(initial, gravity, 2, 0.5, settings)
