"""Calibrate a body force so that the flow reaches a target speed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shodh_moe.solvers.flow import Calibration, FloatArray, smooth_step

RAMP_STEPS = 50
RUNS = 2


def calibrate(target: Calibration, new_flow: Callable[[], Any], fluid_XYZ: NDArray[np.bool_]) -> float:
    """Find the size of the body force that drives the fluid at the target speed, in lattice units.

    Makes two short runs from rest under a force along x, and scales the force after each of them.

    Args:
        new_flow: creates a flow at rest, such as a `LatticeBoltzmann`.
        fluid_XYZ: bool, True in fluid cells.
    """
    force = target.guess
    for _ in range(RUNS):
        # Inertia makes the response less than proportional, so a second run starts from a nearly correct force.
        flow = new_flow()
        flow.run(ramp(np.arange(target.steps))[:, None] * np.array([force, 0.0, 0.0]))
        velocity_3XYZ = flow.velocity()
        measured = float(velocity_3XYZ[0][fluid_XYZ].mean())
        fastest = float(np.sqrt((velocity_3XYZ**2).sum(0).max()))
        if not np.isfinite(fastest) or measured <= 0:
            force /= 4
            continue
        force *= min(target.speed / measured, target.max_speed / fastest)
    return force


def ramp(time_T: NDArray[np.generic]) -> FloatArray:
    """Ramp from 0 to 1 over the first `RAMP_STEPS`, [T]; a sudden force would excite sound for thousands of steps."""
    return smooth_step(np.asarray(time_T, dtype=np.float64) / RAMP_STEPS)
