"""The eddy viscosity is C^2 |S| in a known shear and zero in uniform motion."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shodh_moe.kernels import lattice_boltzmann as reference
from shodh_moe.solvers import LatticeBoltzmann

HEIGHT = 10


@pytest.mark.parametrize("wall_axis", [1, 2])
@pytest.mark.parametrize(("viscosity", "constant", "force"), [(0.02, 1.0, 1e-4), (5e-4, 0.16, 2e-6)])
def test_a_channel_flow_has_the_exact_profile_of_its_eddy_viscosity(
    wall_axis: int, viscosity: float, constant: float, force: float
) -> None:
    """Momentum balance (nu + C^2 |s|) s = F (h - z) of the lower half, s the shear: a quadratic equation for s."""
    shape = tuple(2 * HEIGHT + 1 if axis == wall_axis else 1 for axis in range(3))
    solid_XYZ = np.arange(2 * HEIGHT + 1).reshape(shape) == 0
    stress = force * (HEIGHT - np.arange(2 * HEIGHT + 1))
    shear = np.sign(stress) * (np.sqrt(viscosity**2 + 4 * constant**2 * abs(stress)) - viscosity) / (2 * constant**2)
    eddy = constant**2 * abs(shear)
    assert 0.8 < eddy.max() / viscosity < 3, "the eddies matter and so does the fluid"
    start_3XYZ = np.zeros((3, *shape))
    start_3XYZ[0] = np.concatenate([[0, shear[0] / 2], shear[0] / 2 + np.cumsum(shear[1:-1])]).reshape(shape)
    flow = LatticeBoltzmann(solid_XYZ, viscosity, dtype=np.float64, smagorinsky=constant)
    flow.set_velocity(start_3XYZ)
    flow.run(np.tile([force, 0, 0], (int(HEIGHT**2 / viscosity / 5), 1)))
    profile = flow.velocity()[0].reshape(-1)[1:]
    measured = np.diff(profile)
    # Exclude the wall, and the middle, where |S| has a kink.
    np.testing.assert_allclose(measured[1:8], shear[2:9], rtol=0.02)
    assert np.abs(profile - start_3XYZ[0].reshape(-1)[1:]).max() < 0.02 * profile.max()
    np.testing.assert_allclose(profile, profile[::-1], rtol=1e-9)


def test_an_accelerating_uniform_flow_has_no_eddy_viscosity() -> None:
    # The force contributes a second moment that is not shear.
    solid_XYZ = np.zeros((3, 3, 3), bool)
    flows = [LatticeBoltzmann(solid_XYZ, 1e-3, dtype=np.float64, smagorinsky=c) for c in (0.0, 0.5)]
    for flow in flows:
        flow.set_velocity(np.full((3, 3, 3, 3), 0.05))
        flow.run(np.tile([1e-4, -2e-4, 3e-4], (100, 1)))
    np.testing.assert_allclose(flows[0].velocity(), flows[1].velocity(), rtol=1e-13)
    np.testing.assert_allclose(flows[1].velocity()[:, 0, 0, 0], [0.05995, 0.0301, 0.07985], rtol=1e-12)

    solid, force = torch.from_numpy(solid_XYZ), torch.tensor([1e-4, -2e-4, 3e-4], dtype=torch.float64)
    f = reference.equilibrium(torch.full((3, 3, 3, 3), 0.05, dtype=torch.float64), solid)
    for _ in range(60):
        f = reference.step(f, solid, force, 1e-3)
    u = reference.velocity(f, force, solid) + force.reshape(
        3, 1, 1, 1
    )  # from the next step, since streaming changes nothing
    time = reference.relaxation_time(f, f.sum(0), u, force.reshape(3, 1, 1, 1), 1e-3, 0.5)
    excess = (time - 0.503).max()
    assert excess < 2e-4
    unforced = reference.relaxation_time(f, f.sum(0), u, 0 * force.reshape(3, 1, 1, 1), 1e-3, 0.5)
    assert (unforced - 0.503).max() > 10 * excess


@pytest.mark.parametrize("constant", [0.1, 0.2])
def test_a_vortex_loses_energy_to_both_viscosities(constant: float) -> None:
    n, viscosity, speed, steps = 16, 5e-4, 0.05, 50
    k = 2 * np.pi / n
    x, y, _ = np.meshgrid(k * np.arange(n), k * np.arange(n), [0], indexing="ij")
    start = speed * np.stack([np.sin(x) * np.cos(y), -np.cos(x) * np.sin(y), 0 * x])
    flow = LatticeBoltzmann(np.zeros(x.shape, bool), viscosity, dtype=np.float64, smagorinsky=constant)
    flow.set_velocity(start, settle_pressure=True)
    before = (flow.velocity() ** 2).sum()
    flow.run(np.zeros((steps, 3)))
    strain = 2 * k * speed * np.abs(np.cos(x) * np.cos(y))
    loss = 2 * steps * ((viscosity + constant**2 * strain) * strain**2).sum() / (start**2).sum()
    assert -np.log((flow.velocity() ** 2).sum() / before) == pytest.approx(loss, rel=0.1)


def test_a_negative_constant_is_refused() -> None:
    with pytest.raises(ValueError, match="smagorinsky must not be negative"):
        LatticeBoltzmann(np.zeros((4, 4, 4), bool), 0.1, smagorinsky=-0.1)
