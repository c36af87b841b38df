"""The torch reference of the lattice Boltzmann step against the numba solver, and invalid input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from shodh_moe.kernels import lattice_boltzmann as reference
from shodh_moe.solvers import LatticeBoltzmann

SHAPE = (7, 5, 9)
VISCOSITY, DIFFUSIVITY = 0.004, 0.002


def case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Random solid, velocity, forces and scalar, fast enough for strong eddies, with more than one block of cells."""
    rng = np.random.default_rng(seed)
    solid_XYZ = rng.random(SHAPE) < 0.25
    solid_XYZ[:, :, 0] = True
    return solid_XYZ, 0.03 * rng.standard_normal((3, *SHAPE)), 1e-3 * rng.standard_normal((12, 3)), rng.random(SHAPE)


def run_reference(
    lid: bool, smagorinsky: float, dtype: torch.dtype = torch.float64
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    solid_XYZ, start_3XYZ, force_T3, scalar_XYZ = case(3)
    solid = torch.from_numpy(solid_XYZ)
    u = torch.from_numpy(start_3XYZ).to(dtype).masked_fill(solid, 0)
    f = reference.equilibrium(u, solid)
    g = reference.scalar_equilibrium(torch.from_numpy(scalar_XYZ).to(dtype), u, solid)
    for force_3 in torch.from_numpy(force_T3).to(dtype):
        f = reference.step(f, solid, force_3, VISCOSITY, lid=lid, smagorinsky=smagorinsky)
        u = reference.velocity(f, force_3, solid)
        g = reference.scalar_step(g, u, solid, DIFFUSIVITY, lid=lid)
    assert f.dtype == g.dtype == dtype
    return u.numpy(), reference.pressure(f).numpy(), reference.scalar(g).numpy()


@pytest.mark.parametrize("smagorinsky", [0.0, 0.17])
@pytest.mark.parametrize("lid", [False, True])
def test_numba_computes_the_same(lid: bool, smagorinsky: float) -> None:
    solid_XYZ, start_3XYZ, force_T3, scalar_XYZ = case(3)
    flow = LatticeBoltzmann(solid_XYZ, VISCOSITY, lid, np.float64, False, smagorinsky, DIFFUSIVITY)
    flow.set_velocity(start_3XYZ)
    flow.set_scalar(scalar_XYZ)
    flow.run(force_T3)
    velocity, pressure, scalar = run_reference(lid, smagorinsky)
    np.testing.assert_allclose(flow.velocity(), velocity, rtol=0, atol=1e-14)
    np.testing.assert_allclose(flow.pressure(), pressure, rtol=0, atol=1e-14)
    np.testing.assert_allclose(flow.scalar(), scalar, rtol=0, atol=1e-13)
    plain = LatticeBoltzmann(solid_XYZ, VISCOSITY, lid, np.float64, smagorinsky=smagorinsky)
    plain.set_velocity(start_3XYZ)
    plain.run(force_T3)
    assert np.array_equal(plain.velocity(), flow.velocity()), "a scalar changes nothing in the flow"


def test_eddies_and_lid_matter_in_the_comparison() -> None:
    velocity = run_reference(False, 0.0)[0]
    assert np.abs(run_reference(False, 0.17)[0] - velocity).max() > 1e-4
    assert np.abs(run_reference(True, 0.0)[0] - velocity).max() > 1e-4


def test_float32_agrees_with_float64() -> None:
    for single, double in zip(run_reference(True, 0.17, torch.float32), run_reference(True, 0.17), strict=True):
        assert np.abs(single - double).max() < 3e-6 * np.abs(double).max()


@pytest.mark.parametrize("smagorinsky", [0.0, 0.17])
def test_settling_the_pressure_equals_steps_with_a_fixed_velocity(smagorinsky: float) -> None:
    solid_XYZ, start_3XYZ, _, _ = case(4)
    flow = LatticeBoltzmann(solid_XYZ, VISCOSITY, dtype=np.float64, smagorinsky=smagorinsky)
    flow.set_velocity(start_3XYZ, settle_pressure=True)
    solid, u = torch.from_numpy(solid_XYZ), torch.from_numpy(start_3XYZ)
    f = reference.equilibrium(u, solid)
    zero = [0.0, 0.0, 0.0]
    rate = min(1.0, 4 * np.pi / np.sqrt(3) / max(SHAPE))
    for _ in range(int(20 / rate)):
        f = reference.step(f, solid, zero, VISCOSITY, held_velocity_3XYZ=u, rates=(1.0, rate))
    for _ in range(100):
        f = reference.step(f, solid, zero, VISCOSITY, smagorinsky=smagorinsky, held_velocity_3XYZ=u)
    np.testing.assert_allclose(flow.pressure(), reference.pressure(f).numpy(), atol=1e-13)
    np.testing.assert_allclose(flow.velocity(), reference.velocity(f, zero, solid).numpy(), atol=1e-13)


def test_density_is_one_at_rest() -> None:
    solid = torch.zeros(3, 3, 3, dtype=torch.bool)
    f = reference.step(reference.equilibrium(torch.zeros(3, 3, 3, 3), solid), solid, (0, 0, 0), 0.1)
    assert torch.equal(reference.density(f), torch.ones(3, 3, 3))


def populations(directions: int = 19, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(directions, 4, 4, 4, dtype=dtype)


SOLID = torch.zeros(4, 4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("f", "solid", "options", "message"),
    [
        (populations(18), SOLID, {}, r"populations must be \[19, 4, 4, 4\], not \[18, 4, 4, 4\]"),
        (populations(dtype=torch.float16), SOLID, {}, "populations must be float32 or float64"),
        (populations(), SOLID.float(), {}, "solid_XYZ must be bool"),
        (populations(), SOLID, {"lid": True}, "a lid needs a solid bottom"),
        (populations(), SOLID, {"viscosity": 0.0}, "viscosity must be positive"),
    ],
)
def test_invalid_input_is_refused(f: Tensor, solid: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference.step(f, solid, (0, 0, 0), **({"viscosity": 0.1} | options))
    if "viscosity" not in options:
        u = torch.zeros(3, 4, 4, 4)
        with pytest.raises(ValueError, match=message.replace("19", "7")):
            reference.scalar_step(f[:18] if len(f) == 18 else f[:7], u, solid, 0.1, **options)


def test_a_diffusivity_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="diffusivity must be positive"):
        reference.scalar_step(populations(7), torch.zeros(3, 4, 4, 4), SOLID, 0.0)
