"""A free stream over and through a bed of spheres: fast open flow above, slow flow through pores below.

The stream has the lid and the start of the open channel. One body force, uniform in space, drives both flows: the mean
speed of the stream follows its pulse, and the drag of the spheres keeps the flow through the pores far slower. The
force also sways sideways, so that the flow keeps finding new ways through the pores.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from shodh_moe.base.section import Fraction, NonNegative, Positive, PositiveFloat
from shodh_moe.solvers.calibration import ramp
from shodh_moe.solvers.domains.domain import Grid, PulsedDomain, drawn_speed
from shodh_moe.solvers.domains.open_channel import initial_velocity
from shodh_moe.solvers.domains.porous_media import kozeny_carman
from shodh_moe.solvers.flow import FloatArray, FlowSetup, Pulse
from shodh_moe.solvers.geometry import bed_field, dense_layers, percolating

# Typical slip coefficient of these beds, interface at their crests (docs/validation.md). It sets the mean force.
SLIP = 0.3
_MAX_DRAWS = 100


class PorousBed(PulsedDomain):
    """A free stream over and through a bed of spheres, under a free-slip lid, periodic sideways."""

    viscosity: PositiveFloat = 0.008
    speed: PositiveFloat = Field(0.035, description="target mean speed of the free stream; +-30 % by trajectory")
    spinup_steps: NonNegative = 300
    steps_per_snapshot: Positive = 80
    pulse: Fraction = 0.4
    pulse_period: PositiveFloat = 1800.0
    sway: Fraction = Field(0.3, description="largest relative amplitude of the stream's sideways speed")
    height: list[Fraction] = Field(
        [0.35, 0.55], description="range from which to draw the bed's height, as a share of the depth"
    )
    porosity: list[Fraction] = Field(
        [0.6, 0.85], description="range from which to draw the porosity of the bed below its loose top"
    )
    grain: PositiveFloat = Field(3.0, description="mean radius of the spheres in cells")
    perturbation: Fraction = Field(0.7, description="rms speed of the initial eddies, as a share of the target speed")

    @model_validator(mode="after")
    def _ranges(self) -> PorousBed:
        if len(self.height) != 2 or not 0 < self.height[0] <= self.height[1] <= 0.8:
            raise ValueError(f"height must be [low, high] with 0 < low <= high <= 0.8, not {self.height}")
        if len(self.porosity) != 2 or not 0.4 <= self.porosity[0] <= self.porosity[1] <= 0.95:
            raise ValueError(f"porosity must be [low, high] with 0.4 <= low <= high <= 0.95, not {self.porosity}")
        return self

    def setup(self, grid: Grid, rng: np.random.Generator) -> FlowSetup:
        """See `Domain.setup`."""
        speed = drawn_speed(self, rng)
        solid_XYZ, height, drawn = sphere_bed(grid, self, rng)
        pulse = Pulse.draw(rng, self.pulse, self.pulse_period)
        sway = Pulse.draw(rng, self.sway, self.pulse_period)
        start = speed * (1 + float(pulse.value(np.zeros(1))[0]))
        velocity_3XYZ = initial_velocity(solid_XYZ, start, self.perturbation * speed, rng, floor=height)

        depth = grid[2] - 1 - height
        permeability = kozeny_carman(solid_XYZ[:, :, 1 : 1 + dense_layers(height, self.grain)], self.grain)
        mean_force = self.viscosity * speed / (depth**2 / 3 + depth * math.sqrt(permeability) / SLIP)

        def force(time_T: FloatArray) -> FloatArray:
            force_T3 = np.zeros((len(time_T), 3))
            # The pulse is that of the stream's mean speed, so its time derivative is added to the mean force.
            force_T3[:, 0] = mean_force + speed * pulse.slope(time_T)
            force_T3[:, 1] = speed * sway.slope(time_T)
            return np.asarray(ramp(time_T)[:, None] * force_T3)

        stream_XYZ = ~solid_XYZ
        stream_XYZ[:, :, : height + 1] = False
        return FlowSetup(
            solid_XYZ=solid_XYZ,
            lid=True,
            length=float(depth),
            velocity_3XYZ=velocity_3XYZ,
            force=force,
            stream_XYZ=stream_XYZ,
            parameters={"target_speed": speed, "bed_height": height, **drawn},
        )


def sphere_bed(
    grid: Grid, config: PorousBed, rng: np.random.Generator
) -> tuple[NDArray[np.bool_], int, dict[str, float | int | str]]:
    """Draw a bed of spheres on the bottom layer, through which flow along x is possible.

    Returns:
        The mask [X, Y, Z], bool; the bed's height in cells above the bottom layer, which no sphere exceeds; and the
        other drawn parameters. The porosity is that of the bed's `dense_layers`.

    Raises:
        ValueError: the bed is too low for its spheres, or no mask in 100 draws percolates.
    """
    height = round((grid[2] - 1) * rng.uniform(config.height[0], config.height[1]))
    porosity = rng.uniform(config.porosity[0], config.porosity[1])
    dense = dense_layers(height, config.grain)
    if dense < 1:
        raise ValueError(
            f"a bed of {height} cells is too low for spheres of radius {config.grain:g}: raise height or lower grain"
        )
    for number in range(_MAX_DRAWS):
        field_XYZ = bed_field((grid[0], grid[1], height), config.grain, porosity, rng)
        solid_XYZ = np.zeros(grid, dtype=bool)
        solid_XYZ[:, :, 0] = True
        solid_XYZ[:, :, 1 : height + 1] = field_XYZ < np.quantile(field_XYZ[:, :, :dense], 1 - porosity)
        # The stream always lets flow through, so the dense layers are tested without it.
        if percolating(solid_XYZ[:, :, : dense + 1]) is None:
            continue
        filled_XYZ = percolating(solid_XYZ)
        assert filled_XYZ is not None
        found = float(1 - filled_XYZ[:, :, 1 : dense + 1].mean())
        # Filling dead pores must not change the porosity too much.
        if found > 0.9 * porosity:
            return filled_XYZ, height, {"porosity": found, "geometry_draws": number + 1}
    raise ValueError(
        f"no bed in {_MAX_DRAWS} draws lets flow through at porosity {porosity:.2f}: raise porosity or lower grain"
    )
