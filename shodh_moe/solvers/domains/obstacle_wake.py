"""Flow around bluff bodies in a periodic box without walls: wakes, and bodies in the wakes of other bodies.

The mean flow accelerates smoothly from rest and is then held by a uniform force, so that the Reynolds number does not
depend on the bodies' drag. The stream pulses, sways sideways and starts with weak eddies, because at these Reynolds
numbers a wake would take long to become asymmetric by itself.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from shodh_moe.base.section import Fraction, NonNegative, Positive, PositiveFloat
from shodh_moe.solvers.domains.domain import Grid, PulsedDomain, choose, drawn_speed
from shodh_moe.solvers.eddies import eddies, scaled, wall_fade
from shodh_moe.solvers.flow import FloatArray, FlowSetup, Pulse, Turn, smooth_step

# Smallest gap between two bodies, as a share of their mean size.
_GAP = 0.75
_MAX_DRAWS = 100

Body = Literal["sphere", "cylinder", "box"]


class ObstacleWake(PulsedDomain):
    """Flow at a fixed mean speed around bluff bodies in a periodic box."""

    viscosity: PositiveFloat = 0.004
    speed: PositiveFloat = 0.05
    spinup_steps: NonNegative = 800
    steps_per_snapshot: Positive = 40
    pulse: Fraction = 0.25
    pulse_period: PositiveFloat = 600.0
    bodies: list[Body] = Field(["sphere", "cylinder", "box"], min_length=1, description="kinds of bodies to draw from")
    count: list[Positive] = Field([1, 3], description="range from which to draw the number of bodies")
    size: list[Fraction] = Field(
        [0.2, 0.35], description="range of the bodies' diameter or width, as a share of the shorter side"
    )
    perturbation: Fraction = Field(0.3, description="rms speed of the initial eddies, as a share of the target speed")
    ramp_steps: Positive = Field(200, description="time steps until the stream reaches its speed")

    @model_validator(mode="after")
    def _ranges(self) -> ObstacleWake:
        if len(self.count) != 2 or self.count[0] > self.count[1]:
            raise ValueError(f"count must be [low, high] with low <= high, not {self.count}")
        if len(self.size) != 2 or not 0 < self.size[0] <= self.size[1] <= 0.6:
            raise ValueError(f"size must be [low, high] with 0 < low <= high <= 0.6, not {self.size}")
        return self

    def setup(self, grid: Grid, rng: np.random.Generator) -> FlowSetup:
        """See `Domain.setup`.

        Raises:
            ValueError: there is no room for this number and size of bodies.
        """
        speed = drawn_speed(self, rng)
        solid_XYZ, width, kinds = place_bodies(grid, self, rng)
        pulse = Pulse.draw(rng, self.pulse, self.pulse_period)
        turn = Turn.draw(rng, self.pulse, self.pulse_period)
        eddy_3XYZ = eddies(wall_fade(solid_XYZ, False), width / 4, False, rng)

        def mean_velocity(time_T: FloatArray) -> FloatArray:
            direction_T3 = np.column_stack([1 + pulse.value(time_T), turn.value(time_T)])
            return np.asarray(speed * smooth_step(time_T / self.ramp_steps)[:, None] * direction_T3)

        return FlowSetup(
            solid_XYZ=solid_XYZ,
            lid=False,
            length=width,
            velocity_3XYZ=scaled(eddy_3XYZ, ~solid_XYZ, self.perturbation * speed),
            mean_velocity=mean_velocity,
            parameters={"target_speed": speed, "bodies": " ".join(kinds), "porosity": float(1 - solid_XYZ.mean())},
        )


def place_bodies(
    grid: Grid, config: ObstacleWake, rng: np.random.Generator
) -> tuple[NDArray[np.bool_], float, list[str]]:
    """Place bodies at random without overlap.

    A cylinder's axis is along y or z, across the stream. One side of a box is 2/3 to 4/3 of the other two.

    Returns:
        Solid mask [X, Y, Z], bool, the mean width of the bodies in cells, and their kinds.

    Raises:
        ValueError: there is no room for the bodies.
    """
    short = min(grid)
    count = int(rng.integers(config.count[0], config.count[1] + 1))
    for _ in range(_MAX_DRAWS):
        solid_XYZ = np.zeros(grid, dtype=bool)
        widths: list[float] = []
        kinds: list[str] = []
        for _ in range(count):
            kind: Body = choose(config.bodies, rng)
            width = max(2.0, short * rng.uniform(config.size[0], config.size[1]))
            centre_3 = rng.uniform(0, 1, 3) * grid
            axis = int(rng.integers(1, 3))
            stretch = rng.uniform(2 / 3, 4 / 3)
            if (solid_XYZ & _body(kind, grid, centre_3, width * (1 + 2 * _GAP), axis, stretch)).any():
                break
            solid_XYZ |= _body(kind, grid, centre_3, width, axis, stretch)
            widths.append(width)
            kinds.append(kind)
        else:
            return solid_XYZ, float(np.mean(widths)), kinds
    raise ValueError(f"no room for {count} bodies in {_MAX_DRAWS} draws: lower count or size")


def _body(kind: Body, grid: Grid, centre_3: FloatArray, width: float, axis: int, stretch: float) -> NDArray[np.bool_]:
    """The periodic mask [X, Y, Z] of one body."""
    apart = []
    for cells, centre in zip(grid, centre_3, strict=True):
        offset = np.abs(np.arange(cells) + 0.5 - centre)
        apart.append(np.minimum(offset, cells - offset))
    if kind == "cylinder":
        apart[axis] = np.zeros(grid[axis])
    if kind == "box":
        apart[axis] = apart[axis] / stretch
    x, y, z = apart[0][:, None, None], apart[1][None, :, None], apart[2][None, None, :]
    distance_XYZ = np.maximum(np.maximum(x, y), z) if kind == "box" else np.sqrt(x**2 + y**2 + z**2)
    return np.asarray(distance_XYZ < width / 2)
