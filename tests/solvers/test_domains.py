"""The domains have usable geometry and real dynamics, and seeds keep trajectories independent."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shodh_moe.base.errors import UserError
from shodh_moe.config import Config
from shodh_moe.config import data as data_module
from shodh_moe.config import run as run_module
from shodh_moe.config.load import load_config, load_config_of
from shodh_moe.data import generate
from shodh_moe.solvers import simulate, simulation
from shodh_moe.solvers.domains import (
    DOMAINS,
    DecayingTurbulence,
    Domain,
    ObstacleWake,
    OpenChannel,
    PorousBed,
    PorousMedia,
    porous_bed,
    porous_media,
)
from shodh_moe.solvers.domains.decaying_turbulence import random_turbulence
from shodh_moe.solvers.domains.obstacle_wake import place_bodies
from shodh_moe.solvers.domains.open_channel import boulder_bed, dune_bed, initial_velocity, rough_bed
from shodh_moe.solvers.domains.porous_media import porous_solid
from shodh_moe.solvers.flow import Pulse, Turn, smooth_step
from shodh_moe.solvers.geometry import connected_pores, percolating

GRID = (32, 32, 32)
SMALL_GRID = (16, 16, 16)
FAST = {"spinup_steps": 20, "steps_per_snapshot": 5}
SMALL: dict[str, tuple[str, Domain]] = {
    "open_channel": ("open_channel", OpenChannel(**FAST)),
    "dunes": ("open_channel", OpenChannel(**FAST, bed=["dunes"], roughness=0.25)),
    "boulders": ("open_channel", OpenChannel(**FAST, bed=["boulders"])),
    "porous_media": ("porous_media", PorousMedia(**FAST, grain=3.0)),
    "fractures": ("porous_media", PorousMedia(**FAST, geometry=["fractures"], aperture=4.0)),
    "obstacle_wake": ("obstacle_wake", ObstacleWake(**FAST, ramp_steps=10)),
    "decaying_turbulence": ("decaying_turbulence", DecayingTurbulence(**FAST, peak=2.0)),
    "porous_bed": ("porous_bed", PorousBed(**FAST, grain=1.5)),
}
# Flows with default settings, at their intended grid. A wake forms slowly, so the test does not wait for it.
WHOLE: dict[str, Domain] = {name: kind() for name, kind in DOMAINS.items()}
WHOLE["obstacle_wake"] = ObstacleWake(spinup_steps=300)


def leray_residual(u_3XYZ: np.ndarray) -> float:
    """Share of rms(u) that spectral projection on divergence-free fields removes (Nyquist derivative zero)."""
    k = np.stack(np.meshgrid(*[np.fft.fftfreq(n) * (np.abs(np.fft.fftfreq(n)) < 0.5) for n in GRID], indexing="ij"))
    u_hat = np.fft.fftn(u_3XYZ.astype(np.float64), axes=(1, 2, 3))
    k2 = (k**2).sum(0)
    gradient = np.fft.ifftn(k * (k * u_hat).sum(0) / np.where(k2 == 0, 1, k2), axes=(1, 2, 3)).real
    return float(np.sqrt((gradient**2).sum() / (u_3XYZ.astype(np.float64) ** 2).sum()))


@pytest.mark.parametrize("domain", WHOLE)
def test_flow_changes_between_snapshots_but_smoothly(domain: str) -> None:
    config = WHOLE[domain]
    result = simulate(domain, config, GRID, 0, 0, 12 if domain in ("open_channel", "porous_media") else 6)
    u = result.velocity_T3XYZ.astype(np.float64)
    rms = np.sqrt((u**2).sum(1).mean((1, 2, 3)))
    change = np.sqrt((np.diff(u, axis=0) ** 2).sum(1).mean((1, 2, 3))) / rms[1:]
    assert change.min() > 0.03, "persistence must not be the answer"
    assert 0.06 < change.mean() < 0.3
    assert change.max() < 0.5, "snapshots must follow from each other"
    assert result.parameters["mach"] < 0.3
    assert max(leray_residual(u[t]) for t in (0, -1)) < 0.02, "the floor of a divergence-free decoder"
    assert not u[:, :, result.solid_XYZ].any()
    assert abs(result.pressure_TXYZ.mean()) < 1e-6
    assert np.all(np.diff(result.time_T) == config.steps_per_snapshot)
    expected = result.parameters["target_speed"] * result.parameters["length"] / config.viscosity
    assert 0.5 < result.parameters["reynolds"] / expected < 1.5


@pytest.mark.parametrize("case", SMALL)
def test_every_domain_flows_is_at_rest_in_solids_and_conserves_mass(case: str) -> None:
    domain, config = SMALL[case]
    result = simulate(domain, config, SMALL_GRID, 0, 0, 2)
    u = result.velocity_T3XYZ
    assert np.isfinite(u).all()
    assert np.isfinite(result.pressure_TXYZ).all()
    assert not u[:, :, result.solid_XYZ].any()
    assert np.abs(u[1] - u[0]).max() > 1e-4
    mass_T = 3 * result.pressure_TXYZ.sum((1, 2, 3), dtype=np.float64)
    assert np.abs(mass_T).max() < 1e-6 * SMALL_GRID[0] ** 3
    assert result.solid_XYZ.any() == (domain != "decaying_turbulence")
    for key in ("viscosity", "target_speed", "reynolds", "mach", "cell_reynolds"):
        assert result.parameters[key] > 0
    assert result.parameters["mach"] < 0.3


@pytest.mark.parametrize("case", SMALL)
def test_equal_seeds_give_equal_bits_and_other_seeds_other_flows(case: str) -> None:
    domain, config = SMALL[case]

    def bits(seed: int, trajectory: int) -> tuple[bytes, bytes]:
        result = simulate(domain, config, SMALL_GRID, seed, trajectory, 2)
        return result.velocity_T3XYZ.tobytes(), result.pressure_TXYZ.tobytes()

    assert bits(0, 0) == bits(0, 0)
    assert bits(0, 0)[0] != bits(1, 0)[0] != bits(0, 1)[0]


@pytest.mark.parametrize("case", ["porous_media", "obstacle_wake", "porous_bed"])
def test_more_snapshots_do_not_change_the_first_ones(case: str) -> None:
    domain, config = SMALL[case]
    short, long = (simulate(domain, config, SMALL_GRID, 3, 4, n) for n in (2, 4))
    assert short.velocity_T3XYZ.tobytes() == long.velocity_T3XYZ[:2].tobytes()


def test_a_flow_that_diverges_names_its_trajectory_and_its_keys() -> None:
    config = OpenChannel(speed=0.5, spinup_steps=5)
    keys = r"data\.domains\.open_channel\.viscosity or lower data\.domains\.open_channel\.speed"
    with pytest.raises(UserError, match=rf"open_channel trajectory 3 \(seed 0\).*{keys}"):
        simulate("open_channel", config, SMALL_GRID, 0, 3, 2)


def test_an_impossible_geometry_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(porous_media, "percolating", lambda solid_XYZ: None)
    with pytest.raises(UserError, match=r"porous_media trajectory 0 .*porosity"):
        simulate("porous_media", SMALL["porous_media"][1], (8, 8, 8), 0, 0, 1)
    with pytest.raises(UserError, match=r"porous_media trajectory 0 .*aperture"):
        simulate("porous_media", SMALL["fractures"][1], (8, 8, 8), 0, 0, 1)
    monkeypatch.setattr(porous_bed, "percolating", lambda solid_XYZ: None)
    with pytest.raises(UserError, match=r"porous_bed trajectory 0 .*porosity"):
        simulate("porous_bed", SMALL["porous_bed"][1], SMALL_GRID, 0, 0, 1)
    with pytest.raises(UserError, match=r"porous_bed trajectory 0 .*too low .*raise height or lower grain"):
        simulate("porous_bed", PorousBed(grain=4.0), SMALL_GRID, 0, 0, 1)


@pytest.mark.parametrize("porosity", [[0.65, 0.9], [0.4, 0.4], [0.95, 0.95]])
@pytest.mark.parametrize("kind", ["spheres", "blobs"])
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_porous_solids_percolate_and_keep_their_porosity(porosity: list[float], kind: Any, seed: int) -> None:
    config = PorousMedia(porosity=porosity, geometry=[kind])
    solid_XYZ, drawn = porous_solid((24, 24, 24), config, np.random.default_rng(seed))
    assert 0.9 * porosity[0] <= drawn["porosity"] <= porosity[1] + 0.01
    assert drawn["geometry"] == kind
    again = percolating(solid_XYZ)
    assert again is not None
    assert np.array_equal(again, solid_XYZ), "no dead pore is left"


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_fractures_have_the_configured_width(seed: int) -> None:
    config = PorousMedia(geometry=["fractures"], fractures=[1, 1], aperture=6.0, fracture_roughness=0.0)
    solid_XYZ, drawn = porous_solid((24, 24, 24), config, np.random.default_rng(seed))
    # One plane along x: upright, level, or diagonal, which is longer by the square root of two.
    assert min(abs(drawn["porosity"] - area * 6 / 24) for area in (1, np.sqrt(2))) < 0.05
    assert (solid_XYZ == solid_XYZ[0]).all()


def test_percolation_by_hand() -> None:
    solid_XYZ = np.ones((6, 5, 5), bool)
    solid_XYZ[:, 2, 2] = False
    solid_XYZ[1:3, 0, 0] = False
    solid_XYZ[1:3, 4, 0] = False
    expected = np.ones_like(solid_XYZ)
    expected[:, 2, 2] = False
    np.testing.assert_array_equal(percolating(solid_XYZ), expected)
    pores = connected_pores(solid_XYZ)
    assert len(np.unique(pores)) == 3, "the dead pore is one pore across the periodic face"
    solid_XYZ[3, 2, 2] = True
    assert percolating(solid_XYZ) is None


@pytest.mark.parametrize("bed", [rough_bed, dune_bed, boulder_bed])
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.1, 0.4))
def test_bed_leaves_the_upper_water_free_and_start_is_at_rest_in_it(bed: Any, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    solid_XYZ = bed((16, 24, 16), share, rng)
    assert solid_XYZ[:, :, 0].all()
    assert not solid_XYZ[:, :, int(np.ceil(share * 15)) + 1 :].any()
    assert (solid_XYZ[:, :, 1:] <= solid_XYZ[:, :, :-1]).all() or bed is boulder_bed, "only boulders overhang"
    velocity = initial_velocity(solid_XYZ, 0.03, 0.02, rng)
    assert not velocity[:, solid_XYZ].any()
    assert abs(velocity[0][~solid_XYZ].mean() - 0.03) < 0.02


def test_dunes_are_steeper_downstream() -> None:
    for seed in range(5):
        height_X = dune_bed((96, 16, 48), 0.2, np.random.default_rng(seed)).sum(2)[:, 0]
        change_X = (np.roll(height_X, -8) - height_X).astype(float)
        assert (change_X**3).mean() < 0, "what is slow going up is fast going down"


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_bodies_do_not_touch(seed: int) -> None:
    config = ObstacleWake(count=[2, 2], size=[0.2, 0.2], bodies=["sphere", "box"])
    solid_XYZ, width, kinds = place_bodies(GRID, config, np.random.default_rng(seed))
    assert len(kinds) == 2
    assert abs(width - 0.2 * 32) < 1e-9
    assert len(np.unique(connected_pores(~solid_XYZ))) == 3, "two bodies and the fluid between them"


def test_too_many_bodies_are_a_user_error() -> None:
    config = ObstacleWake(count=[30, 30], size=[0.5, 0.5])
    with pytest.raises(UserError, match=r"obstacle_wake trajectory 0 .*no room for 30 bodies.*count or size"):
        simulate("obstacle_wake", config, SMALL_GRID, 0, 0, 1)


def test_the_stream_past_obstacles_has_the_configured_speed() -> None:
    config = ObstacleWake(spinup_steps=200, steps_per_snapshot=20, ramp_steps=100, pulse=0.0)
    result = simulate("obstacle_wake", config, SMALL_GRID, 0, 0, 2)
    mean_3 = result.velocity_T3XYZ[-1][:, ~result.solid_XYZ].mean(1)
    assert mean_3 == pytest.approx([result.parameters["target_speed"], 0, 0], abs=0.05 * config.speed)


@pytest.mark.parametrize("spectrum", ["k4", "von_karman"])
def test_turbulence_starts_with_the_configured_spectrum(spectrum: Any) -> None:
    grid = (48, 48, 48)
    u, length = random_turbulence(grid, 0.03, spectrum, 6.0, np.random.default_rng(0))
    assert np.sqrt((u**2).mean()) == pytest.approx(0.03)
    assert np.abs(u.mean((1, 2, 3))).max() < 1e-12
    u_hat = np.fft.fftn(u, axes=(1, 2, 3))
    k_3XYZ = np.stack(np.meshgrid(*[np.fft.fftfreq(n, 1 / n) for n in grid], indexing="ij"))
    assert np.abs((k_3XYZ * u_hat).sum(0)).max() < 1e-9, "divergence-free"
    shell_XYZ = np.sqrt((k_3XYZ**2).sum(0)).round().astype(int)
    energy_K = np.bincount(shell_XYZ.ravel(), (np.abs(u_hat) ** 2).sum(0).ravel())
    assert abs(int(energy_K.argmax()) - 6) <= 1
    # L = 3 pi / 4 * sum(E / k) / sum(E), k in radians a cell.
    k_K = np.arange(1, len(energy_K)) * 2 * np.pi / 48
    assert length == pytest.approx(3 * np.pi / 4 * (energy_K[1:] / k_K).sum() / energy_K[1:].sum(), rel=0.05)


def test_a_spectral_peak_at_too_short_waves_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"decaying_turbulence trajectory 0 .*peak"):
        simulate("decaying_turbulence", DecayingTurbulence(peak=1e-3), SMALL_GRID, 0, 0, 1)


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        (PorousMedia, {"porosity": [0.9, 0.4]}, "porosity must be"),
        (PorousMedia, {"porosity": [0.1, 0.4]}, "porosity must be"),
        (PorousMedia, {"fractures": [3, 1]}, "fractures must be"),
        (PorousMedia, {"geometry": []}, "at least 1"),
        (PorousMedia, {"geometry": ["cubes"]}, "spheres"),
        (OpenChannel, {"bed": ["ripples"]}, "dunes"),
        (OpenChannel, {"smagorinsky": -0.1}, "greater than or equal"),
        (ObstacleWake, {"size": [0.0, 0.3]}, "size must be"),
        (ObstacleWake, {"count": [2, 1]}, "count must be"),
        (PorousBed, {"height": [0.5, 0.9]}, "height must be"),
        (PorousBed, {"porosity": [0.85, 0.6]}, "porosity must be"),
        (DecayingTurbulence, {"spectrum": "white"}, "von_karman"),
        (DecayingTurbulence, {"pulse": 0.5}, "Extra inputs"),
    ],
)
def test_invalid_keys_are_refused(kind: type[Domain], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        kind(**keys)


def test_eddy_viscosity_and_scalar_reach_the_solver_and_the_scalar_is_passive() -> None:
    domain, config = SMALL["obstacle_wake"]
    plain = simulate(domain, config, SMALL_GRID, 0, 0, 2)
    assert plain.scalar_TXYZ is None
    for pattern in ("blob", "stripes"):
        carrying = ObstacleWake(**FAST, ramp_steps=10, scalar={"pattern": pattern})
        result = simulate(domain, carrying, SMALL_GRID, 0, 0, 2)
        assert result.velocity_T3XYZ.tobytes() == plain.velocity_T3XYZ.tobytes()
        assert result.scalar_TXYZ is not None
        assert result.scalar_TXYZ.shape == (2, *SMALL_GRID)
        assert not result.scalar_TXYZ[:, result.solid_XYZ].any()
        assert -0.1 < result.scalar_TXYZ.min() <= result.scalar_TXYZ.max() < 1.2
        content_T = result.scalar_TXYZ.sum((1, 2, 3), dtype=np.float64)
        assert content_T[1] == pytest.approx(content_T[0], rel=1e-4), "diffusion and flow keep the amount"
        assert np.abs(np.diff(result.scalar_TXYZ, axis=0)).max() > 1e-3
    damped = simulate(domain, ObstacleWake(**FAST, ramp_steps=10, smagorinsky=0.2), SMALL_GRID, 0, 0, 2)
    assert damped.velocity_T3XYZ.tobytes() != plain.velocity_T3XYZ.tobytes()


def test_the_device_determines_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class OnGpu(simulation.LatticeBoltzmann):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            made.append(options)
            super().__init__(*arguments, **options)

    module = type(sys)("shodh_moe.solvers.on_gpu")
    module.LatticeBoltzmannGPU = OnGpu  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shodh_moe.solvers.on_gpu", module)
    domain, config = SMALL["porous_media"]
    simulate(domain, config, SMALL_GRID, 0, 0, 1, device="cuda")
    assert made == [{"lid": False}] * 3, "two runs to find the force, then the flow itself"


def test_unset_newer_keys_do_not_change_the_written_config() -> None:
    old = {"trajectories", "viscosity", "speed", "spinup_steps", "steps_per_snapshot", "pulse", "pulse_period"}
    assert set(OpenChannel().model_dump()) == old | {"roughness", "perturbation"}
    assert set(PorousMedia().model_dump()) == old | {"porosity", "grain"}
    changed = OpenChannel(bed=["dunes"], smagorinsky=0.1)
    assert OpenChannel.model_validate(changed.model_dump()) == changed
    assert changed.identity()["bed"] == ["dunes"]
    assert "trajectories" not in changed.identity()


TOY = """
import numpy as np

from shodh_moe.base.section import PositiveFloat
from shodh_moe.solvers.domains.domain import Domain, drawn_speed
from shodh_moe.solvers.flow import FlowSetup


class ShearLayer(Domain):
    viscosity: PositiveFloat = 0.01
    thickness: PositiveFloat = 4.0

    def setup(self, grid, rng):
        speed = drawn_speed(self, rng)
        z = 2 * np.pi * (np.arange(grid[2]) + 0.5) / grid[2]
        velocity_3XYZ = np.zeros((3, *grid))
        velocity_3XYZ[0] = speed * np.tanh(np.sin(z) * grid[2] / (2 * np.pi * self.thickness))
        return FlowSetup(
            solid_XYZ=np.zeros(grid, dtype=bool),
            lid=False,
            length=self.thickness,
            velocity_3XYZ=velocity_3XYZ,
            reynolds_speed="rms",
            parameters={"target_speed": speed},
        )
"""
TOY_CONFIG = """
data:
  grid: [8, 8, 8]
  snapshots: 2
  domains:
    open_channel: null
    porous_media: null
    shear_layer:
      trajectories: {train: 1, valid: 1, test: 1}
      spinup_steps: 5
"""


def fresh(path: str | Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load a fresh copy of the module in that file."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_a_new_domain_is_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shear_layer.py").write_text(TOY)
    toy = fresh(tmp_path / "shear_layer.py", "shear_layer", monkeypatch)
    monkeypatch.setitem(DOMAINS, "shear_layer", toy.ShearLayer)
    fresh(data_module.__file__, "shodh_moe.config.data", monkeypatch)
    kind = fresh(run_module.__file__, "shodh_moe.config.run", monkeypatch).Config
    (tmp_path / "toy.yaml").write_text(TOY_CONFIG)
    config = load_config_of(kind, tmp_path / "toy.yaml")
    assert [name for name, _ in config.data.domains.items()] == ["shear_layer"]
    generate(config.data, tmp_path / "made", lambda items, desc, total: items)
    assert {path.name for path in tmp_path.glob("made/data/*/*")} == {"shear_layer_0000.hdf5"}
    assert (tmp_path / "made/stats.yaml").is_file()
    with pytest.raises(UserError, match=r"nearest valid key is 'data\.domains\.shear_layer\.thickness'"):
        load_config_of(kind, tmp_path / "toy.yaml", ["data.domains.shear_layer.thicknes=3"])
    monkeypatch.undo()
    assert "shear_layer" not in Config().data.domains.model_dump()


def test_a_new_domain_does_not_change_existing_configs() -> None:
    assert set(Config().model_dump()["data"]["domains"]) == {"open_channel", "porous_media"}
    named = Config(data={"domains": {"porous_media": None, "obstacle_wake": {}}})
    assert [name for name, _ in named.data.domains.items()] == ["open_channel", "obstacle_wake"]
    assert Config.model_validate(named.model_dump()) == named
    assert named.model_dump()["data"]["domains"]["porous_media"] is None


def test_the_config_of_all_domains_names_them_all() -> None:
    config = load_config(Path(__file__).parents[2] / "configs/data/all_domains.yaml")
    assert [name for name, _ in config.data.domains.items()] == list(DOMAINS)


def test_reading_a_config_loads_no_solver() -> None:
    code = "import sys, shodh_moe.config; print([name for name in ('numba', 'torch', 'scipy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_pulse_slope_is_its_derivative() -> None:
    pulse = Pulse.draw(np.random.default_rng(0), 0.5, 400.0)
    t = np.linspace(0, 900, 7)
    np.testing.assert_allclose(pulse.slope(t), (pulse.value(t + 0.01) - pulse.value(t - 0.01)) / 0.02, atol=1e-9)
    assert np.abs(pulse.value(np.arange(4000.0))).max() <= 0.5


def test_rotation_keeps_the_length() -> None:
    turn = Turn.draw(np.random.default_rng(1), 0.8, 300.0)
    np.testing.assert_allclose(np.linalg.norm(turn.value(np.arange(500.0)), axis=-1), turn.amplitude)


def test_smooth_step_ends() -> None:
    np.testing.assert_array_equal(smooth_step(np.array([-1.0, 0.0, 0.5, 1.0, 2.0])), [0, 0, 0.5, 1, 1])
