"""The number and rate of the steps in which a flow that starts from a given velocity develops its pressure."""

from __future__ import annotations

import math

STRESS_STEPS = 100  # length of the second stage, in which the stresses settle at their own rate


def settling(shape: tuple[int, ...], lid: bool) -> tuple[int, float]:
    """Time steps and odd rate of the first stage, in which the velocity is held and the density settles.

    With the velocity held, the density obeys a wave equation damped by the odd rate. The returned rate damps the
    longest wave of the box critically, so all waves decay together, in a time proportional to the size of the box. The
    slower the rate, the smaller the effect of the given velocity's divergence on the lattice.
    """
    nx, ny, nz = shape
    longest = max(nx, ny, 2 * nz if lid else nz)
    rate = min(1.0, 2 / math.sqrt(3.0) * 2 * math.pi / longest)
    return int(20 / rate), rate
