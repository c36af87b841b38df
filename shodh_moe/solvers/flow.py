"""The description of a flow that a domain passes to the solver, and the pulsed drives that domains share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
# Maps time steps [T] to a vector at each of them [T, 3].
Drive = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True)
class Calibration:
    """The target of a force calibration and its starting point.

    Attributes:
        speed: mean streamwise speed of the fluid.
        max_speed: the largest speed allowed anywhere; it limits the mean in geometries with narrow throats.
        guess: body force along x to try first.
        steps: time steps of a run, in which the flow comes close to its steady state.
        force: turns the calibrated size into the body force as a function of time.
    """

    speed: float
    max_speed: float
    guess: float
    steps: int
    force: Callable[[float], Drive]


@dataclass(frozen=True)
class FlowSetup:
    """Description of one trajectory before its first time step, in lattice units.

    Attributes:
        solid_XYZ: bool, True in solid voxels.
        lid: free-slip lid on the top z face.
        length: the length in the Reynolds number, in cells.
        velocity_3XYZ: initial velocity [3, X, Y, Z]; None for rest.
        force: body force as a function of the time step; None for no force.
        calibration: target for a body force that replaces ``force``; None for no calibration.
        mean_velocity: mean velocity of the fluid as a function of the time step, held by a uniform force; None to
            leave it free.
        reynolds_speed: the speed in the Reynolds number: ``mean`` along x, or ``rms`` of one velocity component.
        stream_XYZ: bool, the cells over which to take the mean speed along x; None for all fluid.
        parameters: the values drawn at random, for the provenance.
    """

    solid_XYZ: NDArray[np.bool_]
    lid: bool
    length: float
    velocity_3XYZ: FloatArray | None = None
    force: Drive | None = None
    calibration: Calibration | None = None
    mean_velocity: Drive | None = None
    reynolds_speed: Literal["mean", "rms"] = "mean"
    stream_XYZ: NDArray[np.bool_] | None = None
    parameters: dict[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pulse:
    """A sum of two sinusoids: sum_i amplitude_i sin(2 pi t / period_i + phase_i).

    Two periods without a common multiple keep the drive from standing still for long.
    """

    amplitude_2: FloatArray
    period_2: FloatArray
    phase_2: FloatArray

    @classmethod
    def draw(cls, rng: np.random.Generator, amplitude: float, period: float) -> Pulse:
        """Draw amplitudes with a sum of 0.5 to 1 times ``amplitude``, and periods near 1 and 0.55 times ``period``."""
        share = rng.uniform(0.5, 0.75)
        total = amplitude * rng.uniform(0.5, 1.0)
        return cls(
            amplitude_2=total * np.array([share, 1 - share]),
            period_2=period * np.array([1.0, 0.55]) * rng.uniform(0.8, 1.25, 2),
            phase_2=rng.uniform(0, 2 * np.pi, 2),
        )

    def value(self, time_T: FloatArray) -> FloatArray:
        """The pulse at the time steps time_T, [T]."""
        return (self.amplitude_2 * np.sin(self._angle(time_T))).sum(-1)

    def slope(self, time_T: FloatArray) -> FloatArray:
        """The time derivative of the pulse at the time steps time_T, [T]."""
        return (self.amplitude_2 * 2 * np.pi / self.period_2 * np.cos(self._angle(time_T))).sum(-1)

    def _angle(self, time_T: FloatArray) -> FloatArray:
        return 2 * np.pi * np.asarray(time_T)[..., None] / self.period_2 + self.phase_2


@dataclass(frozen=True)
class Turn:
    """A vector of fixed length that rotates steadily in a plane, so that the flow it drives never becomes steady."""

    amplitude: float
    period: float
    phase: float

    @classmethod
    def draw(cls, rng: np.random.Generator, amplitude: float, period: float) -> Turn:
        """Draw a length of 0.7 to 1 times ``amplitude``, a period around ``period``, and the sense of rotation."""
        sense = 1 if rng.random() < 0.5 else -1
        return cls(
            amplitude * rng.uniform(0.7, 1.0), sense * period * rng.uniform(0.8, 1.25), rng.uniform(0, 2 * np.pi)
        )

    def value(self, time_T: FloatArray) -> FloatArray:
        """The two components at the time steps time_T, [T, 2]."""
        angle_T = 2 * np.pi * np.asarray(time_T) / self.period + self.phase
        return self.amplitude * np.stack([np.cos(angle_T), np.sin(angle_T)], axis=-1)


def smooth_step(x: FloatArray | float) -> FloatArray:
    """0 for x <= 0, 1 for x >= 1, and 10 x^3 - 15 x^4 + 6 x^5 between: two derivatives vanish at both ends."""
    t = np.clip(x, 0.0, 1.0)
    return np.asarray(t**3 * (10 - 15 * t + 6 * t**2))
