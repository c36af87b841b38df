"""How long a flow that starts from a given velocity takes to find its own pressure."""

from __future__ import annotations

import math

STRESS_STEPS = 100  # of the second stage, in which the stresses settle at their own rate


def settling(shape: tuple[int, ...], lid: bool) -> tuple[int, float]:
    """Time steps and odd rate of the first stage, in which the velocity is held and the density settles.

    With the velocity held, density obeys a damped wave equation whose damping is the odd rate. This one is critical
    for the longest wave of the box: all waves die out together, in a time of the box's size. The slower the rate, the
    less it matters what divergence the given velocity has on the lattice.
    """
    nx, ny, nz = shape
    longest = max(nx, ny, 2 * nz if lid else nz)
    rate = min(1.0, 2 / math.sqrt(3.0) * 2 * math.pi / longest)
    return int(20 / rate), rate
