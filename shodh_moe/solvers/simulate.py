"""Run one trajectory of one domain and keep its snapshots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shodh_moe.config import DomainConfig, OpenChannelConfig, PorousMediaConfig
from shodh_moe.errors import UserError
from shodh_moe.solvers import open_channel, porous_media
from shodh_moe.solvers.flow import FlowSetup
from shodh_moe.solvers.lattice_boltzmann import SOUND_SPEED, DivergedError, LatticeBoltzmann
from shodh_moe.solvers.seeds import trajectory_seed


@dataclass(frozen=True)
class Simulation:
    """One simulated trajectory, lattice units, float32.

    Attributes:
        velocity_T3XYZ: [T, 3, X, Y, Z], zero in solid voxels.
        pressure_TXYZ: [T, X, Y, Z], (density - 1) / 3, zero in solid voxels.
        solid_XYZ: bool [X, Y, Z], True in solid voxels.
        lid: the top z face is a free-slip lid, the bottom a wall; otherwise everything is periodic.
        time_T: time step of each snapshot [T].
        parameters: what defines the trajectory, numbers and words (Reynolds and Mach number included).
    """

    velocity_T3XYZ: NDArray[np.float32]
    pressure_TXYZ: NDArray[np.float32]
    solid_XYZ: NDArray[np.bool_]
    lid: bool
    time_T: NDArray[np.float32]
    parameters: dict[str, float | int | str]


def prepare(config: DomainConfig, grid: tuple[int, int, int], rng: np.random.Generator) -> FlowSetup:
    """Geometry, initial state and force of one trajectory of the domain that ``config`` belongs to."""
    if isinstance(config, OpenChannelConfig):
        return open_channel.setup(config, grid, rng)
    if isinstance(config, PorousMediaConfig):
        return porous_media.setup(config, grid, rng)
    raise TypeError(f"no solver for a {type(config).__name__}")


def simulate(
    domain: str,
    config: DomainConfig,
    grid: tuple[int, int, int],
    seed: int,
    trajectory: int,
    snapshots: int,
    parallel: bool = False,
) -> Simulation:
    """Simulate trajectory number ``trajectory`` of ``domain``: the same bits for the same arguments.

    ``parallel`` lets the solver use all cores for this one flow: worth it on large grids only, same bits.

    Raises:
        UserError: the flow diverged or no geometry can be made at these parameters; names the trajectory.
    """
    name = f"{domain} trajectory {trajectory} (seed {seed})"
    rng = np.random.default_rng(trajectory_seed(seed, domain, trajectory))
    try:
        flow_setup = prepare(config, grid, rng)
        return _run(name, config, flow_setup, snapshots, parallel)
    except DivergedError as error:
        raise UserError(f"{error}: raise data.domains.{domain}.viscosity or lower its speed") from error
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def _run(name: str, config: DomainConfig, setup: FlowSetup, snapshots: int, parallel: bool) -> Simulation:
    solver = LatticeBoltzmann(setup.solid_XYZ, config.viscosity, lid=setup.lid, parallel=parallel)
    if setup.velocity_3XYZ is not None:
        solver.set_velocity(setup.velocity_3XYZ, settle_pressure=True)
    velocities, pressures, times = [], [], []
    now = 0
    for snapshot in range(snapshots):
        steps = config.spinup_steps if snapshot == 0 else config.steps_per_snapshot
        solver.run(setup.force(np.arange(now, now + steps, dtype=np.float64)))
        now += steps
        solver.check(f"{name}, time step {now}")
        velocities.append(solver.velocity(np.float32))
        pressures.append(solver.pressure(np.float32))
        times.append(now)
    velocity_T3XYZ = np.stack(velocities)
    fluid_XYZ = ~setup.solid_XYZ
    mean_speed = float(velocity_T3XYZ[:, 0, fluid_XYZ].mean(dtype=np.float64))
    max_speed = float(np.sqrt((velocity_T3XYZ**2).sum(1).max()))
    parameters: dict[str, float | int | str] = {
        **setup.parameters,
        "viscosity": config.viscosity,
        "mean_speed": mean_speed,
        "max_speed": max_speed,
        "length": setup.length,
        "reynolds": abs(mean_speed) * setup.length / config.viscosity,
        "mach": max_speed / float(SOUND_SPEED),
    }
    return Simulation(
        velocity_T3XYZ=velocity_T3XYZ,
        pressure_TXYZ=np.stack(pressures),
        solid_XYZ=setup.solid_XYZ,
        lid=setup.lid,
        time_T=np.array(times, dtype=np.float32),
        parameters=parameters,
    )
