"""The two domains: usable geometry, a real dynamics to learn, and seeds that keep trajectories independent."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shodh_moe.config import DomainConfig, OpenChannelConfig, PorousMediaConfig
from shodh_moe.errors import UserError
from shodh_moe.solvers import porous_media, simulate
from shodh_moe.solvers.flow import Pulse, Turn, smooth_step
from shodh_moe.solvers.geometry import connected_pores, percolating
from shodh_moe.solvers.open_channel import initial_velocity, rough_bed
from shodh_moe.solvers.porous_media import porous_solid

GRID = (32, 32, 32)
CONFIGS: dict[str, DomainConfig] = {"open_channel": OpenChannelConfig(), "porous_media": PorousMediaConfig()}
SMALL: dict[str, DomainConfig] = {
    "open_channel": OpenChannelConfig(spinup_steps=5, steps_per_snapshot=5),
    "porous_media": PorousMediaConfig(spinup_steps=5, steps_per_snapshot=5, grain=3.0),
}


def leray_residual(u_3XYZ: np.ndarray) -> float:
    """Share of rms(u) that spectral projection on divergence-free fields removes (Nyquist derivative zero)."""
    k = np.stack(np.meshgrid(*[np.fft.fftfreq(n) * (np.abs(np.fft.fftfreq(n)) < 0.5) for n in GRID], indexing="ij"))
    u_hat = np.fft.fftn(u_3XYZ.astype(np.float64), axes=(1, 2, 3))
    k2 = (k**2).sum(0)
    gradient = np.fft.ifftn(k * (k * u_hat).sum(0) / np.where(k2 == 0, 1, k2), axes=(1, 2, 3)).real
    return float(np.sqrt((gradient**2).sum() / (u_3XYZ.astype(np.float64) ** 2).sum()))


@pytest.mark.parametrize("domain", CONFIGS)
def test_flow_changes_between_snapshots_but_smoothly(domain: str) -> None:
    result = simulate(domain, CONFIGS[domain], GRID, 0, 0, 12)
    u = result.velocity_T3XYZ.astype(np.float64)
    rms = np.sqrt((u**2).sum(1).mean((1, 2, 3)))
    change = np.sqrt((np.diff(u, axis=0) ** 2).sum(1).mean((1, 2, 3))) / rms[1:]
    assert change.min() > 0.03, "persistence must not be the answer"
    assert 0.06 < change.mean() < 0.3
    assert change.max() < 0.5, "snapshots must follow from each other"
    assert result.parameters["mach"] < 0.3
    assert max(leray_residual(u[t]) for t in (0, 11)) < 0.02, "the floor of a divergence-free decoder"
    assert not u[:, :, result.solid_XYZ].any()
    assert abs(result.pressure_TXYZ.mean()) < 1e-6
    assert np.all(np.diff(result.time_T) == CONFIGS[domain].steps_per_snapshot)


@pytest.mark.parametrize("domain", CONFIGS)
def test_same_seed_same_bits_other_seed_other_flow(domain: str) -> None:
    def bits(seed: int, trajectory: int) -> tuple[bytes, bytes]:
        result = simulate(domain, SMALL[domain], (16, 16, 16), seed, trajectory, 2)
        return result.velocity_T3XYZ.tobytes(), result.pressure_TXYZ.tobytes()

    assert bits(0, 0) == bits(0, 0)
    assert bits(0, 0)[0] != bits(1, 0)[0] != bits(0, 1)[0]


def test_more_snapshots_do_not_change_the_first_ones() -> None:
    short, long = (simulate("porous_media", SMALL["porous_media"], (16, 16, 16), 3, 4, n) for n in (2, 4))
    assert short.velocity_T3XYZ.tobytes() == long.velocity_T3XYZ[:2].tobytes()


def test_a_flow_that_diverges_names_its_trajectory() -> None:
    config = OpenChannelConfig(speed=0.5, spinup_steps=5)
    with pytest.raises(UserError, match=r"open_channel trajectory 3 \(seed 0\).*viscosity"):
        simulate("open_channel", config, (16, 16, 16), 0, 3, 2)


def test_impossible_geometry_is_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(porous_media, "percolating", lambda solid_XYZ: None)
    with pytest.raises(UserError, match=r"porous_media trajectory 0 .*porosity"):
        simulate("porous_media", SMALL["porous_media"], (8, 8, 8), 0, 0, 1)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_porous_solids_percolate_and_keep_their_porosity(seed: int) -> None:
    config = PorousMediaConfig()
    solid_XYZ, drawn = porous_solid((24, 24, 24), config, np.random.default_rng(seed))
    assert 0.9 * config.porosity[0] <= drawn["porosity"] <= config.porosity[1] + 0.01
    again = percolating(solid_XYZ)
    assert again is not None
    assert np.array_equal(again, solid_XYZ), "no dead pore is left"


def test_percolation_by_hand() -> None:
    solid_XYZ = np.ones((6, 5, 5), bool)
    solid_XYZ[:, 2, 2] = False
    solid_XYZ[1:3, 0, 0] = False
    solid_XYZ[1:3, 4, 0] = False
    wanted = np.ones_like(solid_XYZ)
    wanted[:, 2, 2] = False
    np.testing.assert_array_equal(percolating(solid_XYZ), wanted)
    pores = connected_pores(solid_XYZ)
    assert len(np.unique(pores)) == 3, "the dead pore is one pore across the periodic face"
    solid_XYZ[3, 2, 2] = True
    assert percolating(solid_XYZ) is None


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), roughness=st.floats(0, 0.4))
def test_bed_leaves_the_upper_water_free_and_start_is_at_rest_in_it(seed: int, roughness: float) -> None:
    rng = np.random.default_rng(seed)
    solid_XYZ = rough_bed((16, 24, 16), roughness, rng)
    assert solid_XYZ[:, :, 0].all()
    assert not solid_XYZ[:, :, int(np.ceil(roughness * 15)) + 1 :].any()
    velocity = initial_velocity(solid_XYZ, 0.03, 0.02, rng)
    assert not velocity[:, solid_XYZ].any()
    assert abs(velocity[0][~solid_XYZ].mean() - 0.03) < 0.02


def test_pulse_slope_is_its_derivative() -> None:
    pulse = Pulse.draw(np.random.default_rng(0), 0.5, 400.0)
    t = np.linspace(0, 900, 7)
    np.testing.assert_allclose(pulse.slope(t), (pulse.value(t + 0.01) - pulse.value(t - 0.01)) / 0.02, atol=1e-9)
    assert np.abs(pulse.value(np.arange(4000.0))).max() <= 0.5


def test_turn_keeps_its_length() -> None:
    turn = Turn.draw(np.random.default_rng(1), 0.8, 300.0)
    np.testing.assert_allclose(np.linalg.norm(turn.value(np.arange(500.0)), axis=-1), turn.amplitude)


def test_smooth_step_ends() -> None:
    np.testing.assert_array_equal(smooth_step(np.array([-1.0, 0.0, 0.5, 1.0, 2.0])), [0, 0, 0.5, 1, 1])
