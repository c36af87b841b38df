"""The size of a force that gives a wanted speed, found by measuring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shodh_moe.solvers.flow import Calibration, FloatArray, smooth_step

RAMP_STEPS = 50
RUNS = 2


def calibrate(wanted: Calibration, new_flow: Callable[[], Any], fluid_XYZ: NDArray[np.bool_]) -> float:
    """The size of the force, from two short runs of flows at rest that ``new_flow`` makes."""
    force = wanted.guess
    for _ in range(RUNS):
        # Inertia makes the answer less than proportional: the second run starts from a nearly right force.
        flow = new_flow()
        flow.run(ramp(np.arange(wanted.steps))[:, None] * np.array([force, 0.0, 0.0]))
        velocity_3XYZ = flow.velocity()
        measured = float(velocity_3XYZ[0][fluid_XYZ].mean())
        fastest = float(np.sqrt((velocity_3XYZ**2).sum(0).max()))
        if not np.isfinite(fastest) or measured <= 0:
            force /= 4
            continue
        force *= min(wanted.speed / measured, wanted.max_speed / fastest)
    return force


def ramp(time_T: NDArray[np.generic]) -> FloatArray:
    """From 0 to 1 within the first `RAMP_STEPS`: a sudden force would ring as sound for thousands of steps."""
    return smooth_step(np.asarray(time_T, dtype=np.float64) / RAMP_STEPS)
