"""Simulate one trajectory of one domain and collect its snapshots."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.errors import UserError
from shodh_moe.solvers.calibration import calibrate
from shodh_moe.solvers.d3q19 import SOUND_SPEED
from shodh_moe.solvers.domains import Domain
from shodh_moe.solvers.flow import FlowSetup
from shodh_moe.solvers.lattice_boltzmann import LatticeBoltzmann
from shodh_moe.solvers.limits import DivergedError
from shodh_moe.solvers.seeds import trajectory_seed

# Control of a held mean velocity, in time steps.
_HOLD_EVERY = 10  # between two measurements
_HOLD_TIME = 100.0  # in which a deviation decays to 1/e of its size
_HOLD_MEMORY = 500.0  # over which deviations are added up into the estimated drag

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Simulation:
    """One simulated trajectory in lattice units, float32.

    Attributes:
        velocity_T3XYZ: [T, 3, X, Y, Z], zero in solid voxels.
        pressure_TXYZ: [T, X, Y, Z], (density - 1) / 3, zero in solid voxels.
        solid_XYZ: bool [X, Y, Z], True in solid voxels.
        lid: the top z face is a free-slip lid, the bottom a wall; otherwise everything is periodic.
        time_T: time step of each snapshot [T].
        parameters: values that describe the trajectory, numbers and text, including Reynolds and Mach number.
        forced: whether a body force drives the flow, along x and possibly other directions.
        scalar_TXYZ: passive concentration [T, X, Y, Z], zero in solid voxels; None without one.
    """

    velocity_T3XYZ: NDArray[np.float32]
    pressure_TXYZ: NDArray[np.float32]
    solid_XYZ: NDArray[np.bool_]
    lid: bool
    time_T: NDArray[np.float32]
    parameters: dict[str, float | int | str]
    forced: bool = True
    scalar_TXYZ: NDArray[np.float32] | None = None


def simulate(
    domain: str,
    config: Domain,
    grid: tuple[int, int, int],
    seed: int,
    trajectory: int,
    snapshots: int,
    parallel: bool = False,
    device: Device = "cpu",
) -> Simulation:
    """Simulate trajectory number ``trajectory`` of ``domain``: the same bits for the same arguments.

    Args:
        config: the domain's settings.
        seed: the dataset's seed.
        parallel: use all cores for this flow. This pays only on large grids and gives the same bits.
        device: on ``cuda`` rounding differs, so flows slowly diverge from those of a CPU.

    Raises:
        UserError: the flow diverged, or these settings give no valid flow; the message names the trajectory.
    """
    name = f"{domain} trajectory {trajectory} (seed {seed})"
    rng = np.random.default_rng(trajectory_seed(seed, domain, trajectory))
    try:
        setup = config.setup(grid, rng)
        if setup.calibration:
            fluid_XYZ = ~setup.solid_XYZ
            size = calibrate(setup.calibration, lambda: _solver(config, setup, parallel, device), fluid_XYZ)
            drive, parameters = setup.calibration.force(size), {**setup.parameters, "force": size}
            setup = replace(setup, force=drive, calibration=None, parameters=parameters)
        solver = _solver(config, setup, parallel, device)
        if config.scalar:
            # Drawn last, so that a flow is the same with and without it.
            solver.set_scalar(config.scalar.initial(setup.solid_XYZ, rng))
        return _run(name, config, setup, solver, snapshots)
    except DivergedError as error:
        raise UserError(
            f"{error}: raise data.domains.{domain}.viscosity or lower data.domains.{domain}.speed"
        ) from error
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def _solver(config: Domain, setup: FlowSetup, parallel: bool, device: Device) -> Any:
    options: dict[str, Any] = {"lid": setup.lid}
    if config.smagorinsky:
        options["smagorinsky"] = config.smagorinsky
    if config.scalar:
        options["diffusivity"] = config.scalar.diffusivity
    if device == "cuda":
        from shodh_moe.solvers.on_gpu import LatticeBoltzmannGPU

        return LatticeBoltzmannGPU(setup.solid_XYZ, config.viscosity, **options)
    return LatticeBoltzmann(setup.solid_XYZ, config.viscosity, parallel=parallel, **options)


def _run(name: str, config: Domain, setup: FlowSetup, solver: Any, snapshots: int) -> Simulation:
    if setup.velocity_3XYZ is not None:
        solver.set_velocity(setup.velocity_3XYZ, settle_pressure=True)
    drive = _Drive(setup)
    velocities, pressures, scalars, times = [], [], [], []
    now = 0
    for snapshot in range(snapshots):
        steps = config.spinup_steps if snapshot == 0 else config.steps_per_snapshot
        drive.advance(solver, now, steps)
        now += steps
        solver.check(f"{name}, time step {now}")
        velocities.append(solver.velocity(np.float32))
        pressures.append(solver.pressure(np.float32))
        if config.scalar:
            scalars.append(np.asarray(solver.scalar(), dtype=np.float32))
        times.append(now)
    velocity_T3XYZ = np.stack(velocities)
    return Simulation(
        velocity_T3XYZ=velocity_T3XYZ,
        pressure_TXYZ=np.stack(pressures),
        solid_XYZ=setup.solid_XYZ,
        lid=setup.lid,
        time_T=np.array(times, dtype=np.float32),
        parameters=_parameters(config, setup, velocity_T3XYZ),
        forced=setup.force is not None or setup.mean_velocity is not None,
        scalar_TXYZ=np.stack(scalars) if scalars else None,
    )


class _Drive:
    """The body force of a trajectory: given, or controlled to hold a given mean velocity of the fluid."""

    def __init__(self, setup: FlowSetup) -> None:
        self._setup = setup
        self._fluid_XYZ = ~setup.solid_XYZ
        self._drag_3 = np.zeros(3)

    def advance(self, solver: Any, now: int, steps: int) -> None:
        """Advance ``solver`` by ``steps`` time steps, beginning at time step ``now``."""
        time_T = np.arange(now, now + steps, dtype=np.float64)
        if self._setup.mean_velocity is None:
            force = self._setup.force
            solver.run(force(time_T) if force else np.zeros((steps, 3)))
            return
        for first in range(0, steps, _HOLD_EVERY):
            self._hold(solver, time_T[first : first + _HOLD_EVERY])

    def _hold(self, solver: Any, time_T: NDArray[np.float64]) -> None:
        assert self._setup.mean_velocity is not None
        # The force is the prescribed change of the mean, plus a share of its deviation, plus the drag estimated so far.
        target_T3 = self._setup.mean_velocity(np.append(time_T, time_T[-1] + 1))
        mean_3 = solver.velocity()[:, self._fluid_XYZ].mean(1, dtype=np.float64)
        missing_3 = (target_T3[0] - mean_3) / _HOLD_TIME
        self._drag_3 += missing_3 * (len(time_T) / _HOLD_MEMORY)
        solver.run(np.diff(target_T3, axis=0) + missing_3 + self._drag_3)


def _parameters(config: Domain, setup: FlowSetup, velocity_T3XYZ: NDArray[np.float32]) -> dict[str, float | int | str]:
    fluid_XYZ = ~setup.solid_XYZ
    stream_XYZ = fluid_XYZ if setup.stream_XYZ is None else setup.stream_XYZ
    mean_speed = float(velocity_T3XYZ[:, 0, stream_XYZ].mean(dtype=np.float64))
    square_TXYZ = (velocity_T3XYZ**2).sum(1)
    max_speed = float(np.sqrt(square_TXYZ.max()))
    # Root mean square of one component over all snapshots.
    rms_speed = float(np.sqrt(square_TXYZ[:, fluid_XYZ].mean(dtype=np.float64) / 3))
    speed = rms_speed if setup.reynolds_speed == "rms" else abs(mean_speed)
    return {
        **setup.parameters,
        "viscosity": config.viscosity,
        "mean_speed": mean_speed,
        "rms_speed": rms_speed,
        "max_speed": max_speed,
        "length": setup.length,
        "reynolds": speed * setup.length / config.viscosity,
        "cell_reynolds": max_speed / config.viscosity,
        "mach": max_speed / float(SOUND_SPEED),
    }
