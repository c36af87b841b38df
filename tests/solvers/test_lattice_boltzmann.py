"""The solver against exact solutions; conservation; identical bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shodh_moe.solvers import DivergedError, LatticeBoltzmann
from shodh_moe.solvers.d3q19 import OPPOSITE_Q, VELOCITIES_Q3, WEIGHTS_Q, gather_table

HEIGHT = 10


def film(viscosity: float, lid: bool, force: float = 1e-6) -> np.ndarray:
    """Steady velocity profile between a plate at z = 0 and a plate (or a free-slip lid) HEIGHT above it."""
    solid_XYZ = np.zeros((2, 2, HEIGHT + 1), bool)
    solid_XYZ[:, :, 0] = True
    flow = LatticeBoltzmann(solid_XYZ, viscosity, lid=lid, dtype=np.float64)
    flow.run(np.tile([force, 0, 0], (int(12 * HEIGHT**2 / viscosity), 1)))
    return flow.velocity()[0, 0, 0, 1:]


@pytest.mark.parametrize("viscosity", [0.02, 0.3])
@pytest.mark.parametrize("lid", [False, True])
def test_poiseuille_profile_is_exact_at_any_viscosity(viscosity: float, lid: bool) -> None:
    z = np.arange(1, HEIGHT + 1) - 0.5
    exact = 1e-6 / (2 * viscosity) * z * ((2 * HEIGHT if lid else HEIGHT) - z)
    np.testing.assert_allclose(film(viscosity, lid), exact, rtol=1e-9)


def test_force_across_a_plate_channel_is_isotropic() -> None:
    solid_XYZ = np.zeros((HEIGHT + 1, 2, 2), bool)
    solid_XYZ[0] = True
    flow = LatticeBoltzmann(solid_XYZ, 0.1, dtype=np.float64)
    flow.run(np.tile([0, 0, 1e-6], (int(12 * HEIGHT**2 / 0.1), 1)))
    np.testing.assert_allclose(flow.velocity()[2, 1:, 0, 0], film(0.1, False), rtol=1e-9)


@pytest.mark.parametrize("axes", [(0, 1), (1, 2), (2, 0)])
def test_taylor_green_vortex_decays_at_the_stated_viscosity(axes: tuple[int, int]) -> None:
    n, viscosity, steps, u0 = 32, 0.05, 200, 1e-3
    k = 2 * np.pi / n
    a, b = axes
    x = np.meshgrid(*[np.arange(n if axis in axes else 2) for axis in range(3)], indexing="ij")
    start = np.zeros((3, *x[0].shape))
    start[a] = u0 * np.sin(k * x[a]) * np.cos(k * x[b])
    start[b] = -u0 * np.cos(k * x[a]) * np.sin(k * x[b])
    flow = LatticeBoltzmann(np.zeros(x[0].shape, bool), viscosity, dtype=np.float64)
    flow.set_velocity(start, settle_pressure=True)
    before = flow.velocity()
    flow.run(np.zeros((steps, 3)))
    decay = np.exp(-2 * viscosity * k**2 * steps)
    assert np.abs(flow.velocity() - decay * before).max() < 2e-3 * u0
    np.testing.assert_allclose(before, start, atol=2e-2 * u0)


def test_the_settled_pressure_equals_the_taylor_green_pressure() -> None:
    n, u0 = 32, 0.02
    k = 2 * np.pi / n
    x, y, _ = np.meshgrid(np.arange(n), np.arange(n), np.arange(2), indexing="ij")
    start = u0 * np.stack([np.sin(k * x) * np.cos(k * y), -np.cos(k * x) * np.sin(k * y), 0.0 * x])
    exact = u0**2 / 4 * (np.cos(2 * k * x) + np.cos(2 * k * y))
    flow = LatticeBoltzmann(np.zeros(x.shape, bool), 0.02, dtype=np.float64)
    flow.set_velocity(start, settle_pressure=True)
    assert np.abs(flow.pressure() - exact).max() < 0.05 * u0**2 / 2
    flow.run(np.zeros((5, 3)))
    assert np.abs(flow.pressure() - exact).max() < 0.05 * u0**2 / 2, "no sound"


def random_solid(seed: int, shape: tuple[int, int, int] = (8, 6, 10)) -> np.ndarray:
    solid_XYZ = np.random.default_rng(seed).random(shape) < 0.3
    solid_XYZ[:, :, 0] = True
    solid_XYZ[0, 0, 1] = False
    return solid_XYZ


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), lid=st.booleans(), steps=st.integers(1, 40))
def test_mass_is_conserved_and_solids_stay_at_rest(seed: int, lid: bool, steps: int) -> None:
    solid_XYZ = random_solid(seed)
    flow = LatticeBoltzmann(solid_XYZ, 0.1, lid=lid, dtype=np.float64)
    rng = np.random.default_rng(seed)
    flow.set_velocity(0.02 * rng.standard_normal((3, *solid_XYZ.shape)))
    before = flow.mass()
    flow.run(1e-4 * rng.standard_normal((steps, 3)))
    assert abs(flow.mass() - before) < 1e-12 * flow.n_fluid
    assert not flow.velocity()[:, solid_XYZ].any()
    assert not flow.pressure()[solid_XYZ].any()


@given(seed=st.integers(0, 10_000), lid=st.booleans())
@settings(max_examples=25, deadline=None)
def test_streaming_is_a_permutation(seed: int, lid: bool) -> None:
    table = gather_table(random_solid(seed), lid)
    assert np.array_equal(np.sort(table.reshape(-1)), np.arange(table.size))


def test_velocity_set_is_isotropic_to_fourth_order() -> None:
    c = VELOCITIES_Q3.astype(float)
    assert np.array_equal(c[OPPOSITE_Q], -c)
    np.testing.assert_allclose(WEIGHTS_Q.sum(), 1)
    np.testing.assert_allclose(np.einsum("q,qa,qb->ab", WEIGHTS_Q, c, c), np.eye(3) / 3, atol=1e-15)
    d = np.eye(3)
    expected = sum(np.einsum(s, d, d) for s in ("ab,cd->abcd", "ac,bd->abcd", "ad,bc->abcd")) / 9
    np.testing.assert_allclose(np.einsum("q,qa,qb,qc,qd->abcd", WEIGHTS_Q, c, c, c, c), expected, atol=1e-15)


def test_a_channel_under_a_lid_equals_half_of_a_full_channel() -> None:
    half = np.zeros((6, 4, 7), bool)
    half[:, :, 0] = True
    half[2, 1, 1:3] = True
    whole = np.concatenate([half, half[:, :, ::-1]], axis=2)
    force = np.tile([1e-5, 0, 0], (400, 1))
    flows = [LatticeBoltzmann(half, 0.1, lid=True, dtype=np.float64), LatticeBoltzmann(whole, 0.1, dtype=np.float64)]
    for flow in flows:
        flow.run(force)
    np.testing.assert_allclose(flows[0].velocity(), flows[1].velocity()[..., :7], atol=1e-14)
    np.testing.assert_allclose(flows[0].pressure(), flows[1].pressure()[..., :7], atol=1e-14)


def test_results_do_not_depend_on_threads_or_stepping() -> None:
    force = 1e-4 * np.random.default_rng(0).standard_normal((31, 3))
    results = []
    for parallel, pieces in ((False, [31]), (False, [1, 10, 20]), (True, [31])):
        flow = LatticeBoltzmann(random_solid(1, (16, 16, 16)), 0.02, lid=True, parallel=parallel)
        for piece in np.split(force, np.cumsum(pieces)[:-1]):
            flow.run(piece)
        results.append(flow.velocity().tobytes())
    assert results[0] == results[1] == results[2]


def test_float32_agrees_with_float64() -> None:
    runs = []
    for dtype in (np.float32, np.float64):
        flow = LatticeBoltzmann(random_solid(2), 0.05, dtype=dtype)
        flow.run(np.tile([1e-5, 0, 0], (200, 1)))
        runs.append(flow.velocity(np.float64))
    assert np.abs(runs[0] - runs[1]).max() < 1e-5 * np.abs(runs[1]).max()


def test_divergence_is_reported_by_name() -> None:
    flow = LatticeBoltzmann(np.zeros((4, 4, 4), bool), 0.1)
    flow.run(np.tile([0.1, 0, 0], (5, 1)))
    with pytest.raises(DivergedError, match=r"flow 7: speed 0\.\d+ exceeds 0\.3"):
        flow.check("flow 7")
    flow.run(np.full((3, 3), np.nan))
    with pytest.raises(DivergedError, match=r"flow 7: .*non-finite"):
        flow.check("flow 7")


@pytest.mark.parametrize(
    "arguments",
    [(np.ones((4, 4, 4), bool), 0.1), (np.zeros((4, 4), bool), 0.1), (np.zeros((4, 4, 4), bool), 0.0)],
)
def test_invalid_arguments_are_refused(arguments: tuple[np.ndarray, float]) -> None:
    with pytest.raises(ValueError, match=r"solid_XYZ must be|viscosity must be"):
        LatticeBoltzmann(*arguments)


def test_a_lid_needs_a_bottom() -> None:
    with pytest.raises(ValueError, match="bottom"):
        LatticeBoltzmann(np.zeros((4, 4, 4), bool), 0.1, lid=True)


@pytest.mark.parametrize("axis", [1, 2])
def test_a_shear_wave_decays_equally_in_a_moving_frame(axis: int) -> None:
    # A wave of u_x along another axis, carried by a flow along that axis. The error of the decay is 3 speed^2.
    n, viscosity, steps, speed = 32, 0.05, 640, 0.05
    angle = 2 * np.pi * np.arange(n) / n
    shape = tuple(n if a == axis else 1 for a in range(3))
    flow = LatticeBoltzmann(np.zeros(shape, bool), viscosity, dtype=np.float64)
    start = np.zeros((3, *shape))
    start[0] = 1e-3 * np.sin(angle).reshape(shape)
    start[axis] = speed
    flow.set_velocity(start, settle_pressure=True)
    flow.run(np.zeros((steps, 3)))
    amplitude = 2 * (flow.velocity()[0].reshape(-1) * np.exp(-1j * (angle - np.pi / 2))).mean() / 1e-3
    assert -np.log(abs(amplitude)) == pytest.approx(viscosity * (2 * np.pi / n) ** 2 * steps, rel=0.015)
    # The wave has crossed the periodic box once.
    assert abs(np.angle(amplitude)) < 0.02
