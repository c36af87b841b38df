"""Porous-media flow: a periodic random solid, driven by a mean pressure gradient, started from rest.

The gradient's x part pulses and its y and z parts turn, so that the flow keeps finding new ways through the pores.
Its size is set by measuring, on a short run, the speed that a first guess (Kozeny-Carman) gives.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shodh_moe.config import PorousMediaConfig
from shodh_moe.solvers.flow import FloatArray, FlowSetup, Pulse, Turn, smooth_step
from shodh_moe.solvers.geometry import blob_field, percolating, sphere_field, threshold
from shodh_moe.solvers.lattice_boltzmann import LatticeBoltzmann

RAMP_STEPS = 50
# The pulse adds up to the same again: the Mach number stays near 0.2.
MAX_THROAT_SPEED = 0.08
_MAX_DRAWS = 100


def porous_solid(
    grid: tuple[int, int, int], config: PorousMediaConfig, rng: np.random.Generator
) -> tuple[NDArray[np.bool_], dict[str, float | int | str]]:
    """A solid mask [X, Y, Z] that lets flow through along x, and what was drawn for it.

    Raises:
        ValueError: no mask in 100 draws percolates (porosity too low for the grain size).
    """
    kind = "spheres" if rng.random() < 0.5 else "blobs"
    porosity = rng.uniform(config.porosity[0], config.porosity[1])
    for sub_seed in range(_MAX_DRAWS):
        draw = np.random.default_rng(rng.integers(2**63))
        if kind == "spheres":
            field_XYZ = sphere_field(grid, config.grain, porosity, draw)
        else:
            field_XYZ = blob_field(grid, config.grain, draw)
        solid_XYZ = percolating(threshold(field_XYZ, porosity))
        # Filling dead pores must not leave a different porosity than the one asked for.
        if solid_XYZ is not None and solid_XYZ.any() and 1 - solid_XYZ.mean() > 0.9 * porosity:
            drawn: dict[str, float | int | str] = {
                "geometry": kind,
                "porosity": float(1 - solid_XYZ.mean()),
                "geometry_draws": sub_seed + 1,
            }
            return solid_XYZ, drawn
    raise ValueError(
        f"no percolating porous solid in {_MAX_DRAWS} draws at porosity {porosity:.2f}: raise porosity or lower grain"
    )


def driving_force(solid_XYZ: NDArray[np.bool_], viscosity: float, speed: float, grain: float) -> float:
    """The body force that gives a mean streamwise ``speed`` over the fluid, from two short runs.

    Less where a narrow throat would become faster than `MAX_THROAT_SPEED`.
    """
    porosity = 1 - float(solid_XYZ.mean())
    # Kozeny-Carman for spheres of diameter d: permeability = porosity^3 d^2 / (180 (1 - porosity)^2).
    permeability = porosity**3 * (2 * grain) ** 2 / (180 * (1 - porosity) ** 2)
    force = viscosity * speed * porosity / permeability
    # Momentum diffuses across a pore of about the grain's size well within this time.
    steps = int(np.clip(0.6 * grain**2 / viscosity, 100, 1000))
    for _ in range(2):
        # Inertia makes the answer less than proportional: the second run starts from a nearly right force.
        flow = LatticeBoltzmann(solid_XYZ, viscosity)
        flow.run(_ramp(np.arange(steps))[:, None] * np.array([force, 0.0, 0.0]))
        velocity_3XYZ = flow.velocity()
        measured = float(velocity_3XYZ[0][~solid_XYZ].mean())
        fastest = float(np.sqrt((velocity_3XYZ**2).sum(0).max()))
        if not np.isfinite(fastest) or measured <= 0:
            force /= 4
            continue
        force *= min(speed / measured, MAX_THROAT_SPEED / fastest)
    return force


def setup(config: PorousMediaConfig, grid: tuple[int, int, int], rng: np.random.Generator) -> FlowSetup:
    """One porous-media trajectory, drawn from ``rng``."""
    speed = config.speed * rng.uniform(0.7, 1.3)
    solid_XYZ, drawn = porous_solid(grid, config, rng)
    pulse = Pulse.draw(rng, config.pulse, config.pulse_period)
    turn = Turn.draw(rng, config.pulse, config.pulse_period)
    size = driving_force(solid_XYZ, config.viscosity, speed, config.grain)

    def force(time_T: FloatArray) -> FloatArray:
        direction_T3 = np.column_stack([1 + pulse.value(time_T), turn.value(time_T)])
        return np.asarray(size * _ramp(time_T)[:, None] * direction_T3)

    return FlowSetup(
        solid_XYZ=solid_XYZ,
        lid=False,
        velocity_3XYZ=None,
        force=force,
        length=2 * config.grain,
        parameters={"target_speed": speed, "force": size, **drawn},
    )


def _ramp(time_T: NDArray[np.generic]) -> FloatArray:
    # A sudden force would ring as sound for thousands of steps.
    return smooth_step(np.asarray(time_T, dtype=np.float64) / RAMP_STEPS)
