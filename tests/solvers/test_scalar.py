"""The scalar has exact decay and transport, closed walls, conservation and identical bits."""

from __future__ import annotations

import numpy as np
import pytest

from shodh_moe.solvers import LatticeBoltzmann

REST = (0.0, 0.0, 0.0)


def carry(scalar_XYZ: np.ndarray, velocity_3: tuple[float, ...], diffusivity: float, steps: int) -> np.ndarray:
    """Return the scalar after ``steps`` in a uniform flow without walls."""
    flow = LatticeBoltzmann(np.zeros(scalar_XYZ.shape, bool), 0.1, dtype=np.float64, diffusivity=diffusivity)
    flow.set_velocity(np.broadcast_to(np.reshape(velocity_3, (3, 1, 1, 1)), (3, *scalar_XYZ.shape)))
    flow.set_scalar(scalar_XYZ)
    flow.run(np.zeros((steps, 3)))
    return flow.scalar()


def wave(n: int, axis: int, shift: float = 0.0) -> np.ndarray:
    """sin(2 pi (x - shift) / n) along one axis of a thin box."""
    shape = tuple(n if a == axis else 1 for a in range(3))
    return np.sin(2 * np.pi * (np.arange(n) - shift) / n).reshape(shape)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("diffusivity", [0.003, 0.2])
def test_a_wave_decays_at_the_stated_diffusivity_with_second_order(axis: int, diffusivity: float) -> None:
    errors = []
    for n in (16, 32):
        # At the same physical time, one e-fold.
        rate = diffusivity * (2 * np.pi / n) ** 2
        steps = round(1 / rate)
        error = carry(1 + wave(n, axis), REST, diffusivity, steps) - 1 - np.exp(-rate * steps) * wave(n, axis)
        errors.append(np.abs(error).max())
    assert errors[0] < 0.02
    assert errors[0] / errors[1] > 3.5


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_wave_moves_with_the_flow_with_second_order(axis: int) -> None:
    errors = []
    for n in (24, 48):
        # The wave crosses the box once. Scaling is diffusive, so the speed falls with the cell size.
        speed, diffusivity = 1.6 / n, 0.02
        steps = round(n / speed)
        velocity = tuple(speed if a == axis else 0.0 for a in range(3))
        decay = np.exp(-diffusivity * (2 * np.pi / n) ** 2 * steps)
        errors.append(np.abs(carry(wave(n, axis), velocity, diffusivity, steps) - decay * wave(n, axis)).max() / decay)
    assert errors[0] < 0.07
    assert errors[0] / errors[1] > 3.5


def test_diffusion_along_an_axis_does_not_depend_on_the_speed() -> None:
    n, diffusivity, steps, speed = 64, 0.2, 400, 0.1
    moved = carry(wave(n, 0), (speed, 0.0, 0.0), diffusivity, steps)
    still = carry(wave(n, 0), REST, diffusivity, steps)
    # Without the squares in the equilibrium it would be 4 % less.
    losses = [1 - np.sqrt(2 * (c**2).mean()) for c in (moved, still)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


@pytest.mark.parametrize("lid", [False, True])
def test_walls_and_lid_are_impermeable_and_lie_half_a_cell_away(lid: bool) -> None:
    # Between z = 0 and z = n the slowest mode is cos(pi z / n), with or without lid.
    n, diffusivity = 16, 0.05
    solid_XYZ = np.zeros((1, 1, n + 1 if lid else n + 2), bool)
    solid_XYZ[:, :, 0] = True
    solid_XYZ[:, :, n + 1 :] = True
    mode = np.cos(np.pi * (np.arange(n) + 0.5) / n)
    flow = LatticeBoltzmann(solid_XYZ, 0.1, lid=lid, dtype=np.float64, diffusivity=diffusivity)
    flow.set_scalar(np.pad(1 + mode, (1, 0 if lid else 1))[None, None])
    rate = diffusivity * (np.pi / n) ** 2
    steps = round(1 / rate)
    flow.run(np.zeros((steps, 3)))
    np.testing.assert_allclose(flow.scalar()[0, 0, 1 : n + 1], 1 + np.exp(-rate * steps) * mode, atol=2e-3)


@pytest.mark.parametrize("lid", [False, True])
def test_the_total_is_conserved_in_a_moving_closed_box(lid: bool) -> None:
    rng = np.random.default_rng(0)
    solid_XYZ = rng.random((9, 8, 10)) < 0.3
    solid_XYZ[:, :, 0] = True
    flow = LatticeBoltzmann(solid_XYZ, 0.02, lid=lid, dtype=np.float64, diffusivity=0.001)
    flow.set_velocity(0.02 * rng.standard_normal((3, *solid_XYZ.shape)))
    flow.set_scalar(rng.random(solid_XYZ.shape))
    before = flow.scalar()
    assert before[solid_XYZ].max() == 0
    flow.run(1e-4 * rng.standard_normal((50, 3)))
    after = flow.scalar()
    assert after.sum() == pytest.approx(before.sum(), rel=1e-13)
    assert np.abs(after - before).max() > 0.1
    assert after[solid_XYZ].max() == 0


def test_results_do_not_depend_on_threads_or_stepping() -> None:
    rng = np.random.default_rng(1)
    solid_XYZ = rng.random((16, 16, 16)) < 0.3
    solid_XYZ[:, :, 0] = True
    scalar_XYZ = rng.random(solid_XYZ.shape)
    force = 1e-4 * rng.standard_normal((21, 3))
    results = []
    for parallel, pieces in ((False, [21]), (False, [1, 10, 10]), (True, [21])):
        flow = LatticeBoltzmann(solid_XYZ, 0.02, lid=True, parallel=parallel, smagorinsky=0.17, diffusivity=0.01)
        flow.set_scalar(scalar_XYZ)
        for piece in np.split(force, np.cumsum(pieces)[:-1]):
            flow.run(piece)
        results.append(flow.scalar().tobytes() + flow.velocity().tobytes())
    assert results[0] == results[1] == results[2]


def test_the_scalar_does_not_change_while_the_pressure_settles() -> None:
    scalar_XYZ = np.random.default_rng(2).random((8, 8, 8))
    flow = LatticeBoltzmann(np.zeros((8, 8, 8), bool), 0.1, dtype=np.float64, diffusivity=0.1)
    flow.set_scalar(scalar_XYZ)
    flow.set_velocity(np.zeros((3, 8, 8, 8)), settle_pressure=True)
    np.testing.assert_allclose(flow.scalar(), scalar_XYZ, rtol=1e-14)


def test_invalid_use_is_refused() -> None:
    solid_XYZ = np.zeros((4, 4, 4), bool)
    flow = LatticeBoltzmann(solid_XYZ, 0.1)
    with pytest.raises(ValueError, match="carries no scalar"):
        flow.scalar()
    with pytest.raises(ValueError, match="carries no scalar"):
        flow.set_scalar(np.zeros((4, 4, 4)))
    with pytest.raises(ValueError, match="diffusivity must be positive, not -1"):
        LatticeBoltzmann(solid_XYZ, 0.1, diffusivity=-1.0)
    with pytest.raises(ValueError, match=r"the scalar must be \[4, 4, 4\], not \[4, 4\]"):
        LatticeBoltzmann(solid_XYZ, 0.1, diffusivity=0.1).set_scalar(np.zeros((4, 4)))
