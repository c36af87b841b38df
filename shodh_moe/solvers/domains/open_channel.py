"""Open-channel flow: gravity along x, a rough no-slip bed, a free-slip lid as water surface, periodic sideways.

The flow starts from a laminar velocity profile plus random eddies. Both are the curl of a vector potential that
vanishes smoothly at the walls, hence divergence-free and at rest in the bed. At the default viscosity the eddies live
much longer than a trajectory, while pulsed gravity accelerates and slows the bulk.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from shodh_moe.base.section import Fraction, Positive, PositiveFloat
from shodh_moe.solvers.domains.domain import Domain, Grid, PulsedDomain, choose, drawn_speed
from shodh_moe.solvers.eddies import curl, eddies, scaled, wall_fade
from shodh_moe.solvers.flow import FloatArray, FlowSetup, Pulse
from shodh_moe.solvers.geometry import add_sphere

# Width of the filter that makes the eddies, as a share of the depth. An eddy is about six widths across.
_EDDY = 1 / 8

Bed = Literal["spheres", "dunes", "boulders"]


class OpenChannel(PulsedDomain):
    """Gravity-driven flow over a rough no-slip bed under a free-slip lid, periodic sideways."""

    added_keys: ClassVar[frozenset[str]] = Domain.added_keys | {"bed", "boulder"}

    viscosity: PositiveFloat = 0.005
    steps_per_snapshot: Positive = 50
    pulse_period: PositiveFloat = 800.0
    bed: list[Bed] = Field(["spheres"], min_length=1, description="kinds of bed from which each trajectory draws one")
    roughness: Fraction = Field(0.15, description="largest height of spheres and dunes, as a share of the depth")
    boulder: Fraction = Field(0.4, description="largest height of boulders, as a share of the depth")
    perturbation: Fraction = Field(0.7, description="rms speed of the initial eddies, as a share of the target speed")

    def setup(self, grid: Grid, rng: np.random.Generator) -> FlowSetup:
        """See `Domain.setup`."""
        depth = grid[2] - 1
        speed = drawn_speed(self, rng)
        kind: Bed = choose(self.bed, rng)
        if kind == "spheres":
            solid_XYZ = rough_bed(grid, self.roughness, rng)
        elif kind == "dunes":
            solid_XYZ = dune_bed(grid, self.roughness, rng)
        else:
            solid_XYZ = boulder_bed(grid, self.boulder, rng)
        velocity_3XYZ = initial_velocity(solid_XYZ, speed, self.perturbation * speed, rng)
        pulse = Pulse.draw(rng, self.pulse, self.pulse_period)
        # Slope that holds a laminar film on a plane bed at this mean speed (Nusselt).
        slope = 3 * self.viscosity * speed / depth**2

        def force(time_T: FloatArray) -> FloatArray:
            force_T3 = np.zeros((len(time_T), 3))
            # The pulse is that of the bulk speed, so its time derivative is added to gravity.
            force_T3[:, 0] = slope + speed * pulse.slope(time_T)
            return force_T3

        return FlowSetup(
            solid_XYZ=solid_XYZ,
            lid=True,
            length=float(depth),
            velocity_3XYZ=velocity_3XYZ,
            force=force,
            parameters={"target_speed": speed, "bed": kind, "bed_share": float(solid_XYZ[:, :, 1].mean())},
        )


def rough_bed(shape: Grid, roughness: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Solid mask [X, Y, Z]: the bottom layer and half-buried spheres of at most ``roughness`` times the depth."""
    nx, ny, nz = shape
    solid_XYZ = _flat_bed(shape)
    largest = roughness * (nz - 1)
    if largest < 1:
        return solid_XYZ
    distance_XYZ = np.full(shape, np.inf)
    # Elements cover about a quarter of the bed.
    covered = 0.0
    while covered < 0.25 * nx * ny:
        height = largest * rng.uniform(0.6, 1.0)
        width = height * rng.uniform(1.0, 1.5)
        # Only a cap of the sphere is above the bed: flatter than a half sphere, hence smoother on the grid.
        radius = (width**2 + height**2) / (2 * height)
        centre_3 = np.array([rng.uniform(0, nx), rng.uniform(0, ny), 1 + height - radius])
        add_sphere(distance_XYZ, centre_3, radius, periodic_z=False)
        covered += np.pi * width**2
    return solid_XYZ | (distance_XYZ < 0)


def dune_bed(shape: Grid, roughness: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Solid mask [X, Y, Z]: a train of equal dunes across the stream, of at most ``roughness`` times the depth.

    Along the stream a dune rises slowly and falls steeply, and its crest meanders.
    """
    nx, ny, nz = shape
    height = roughness * (nz - 1) * rng.uniform(0.6, 1.0)
    count = max(1, round(nx / max(8.0, height * rng.uniform(6, 12))))
    crest = rng.uniform(0.65, 0.8)
    across_Y = 2 * np.pi * (np.arange(ny) + 0.5) / ny
    winding_Y = rng.uniform(0.05, 0.15) * np.sin(across_Y * rng.integers(1, 3) + rng.uniform(0, 2 * np.pi))
    along_X = count * (np.arange(nx) + 0.5) / nx + rng.uniform(0, 1)
    phase_XY = (along_X[:, None] + winding_Y) % 1
    rising_XY = np.sin(np.pi / 2 * phase_XY / crest) ** 2
    falling_XY = np.cos(np.pi / 2 * (phase_XY - crest) / (1 - crest)) ** 2
    top_XY = 1 + height * np.where(phase_XY < crest, rising_XY, falling_XY)
    return _flat_bed(shape) | (np.arange(nz) + 0.5 < top_XY[..., None])


def boulder_bed(shape: Grid, share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Solid mask [X, Y, Z]: the bottom layer and a few nearly whole spheres of at most ``share`` of the depth."""
    nx, ny, nz = shape
    distance_XYZ = np.full(shape, np.inf)
    covered = 0.0
    while covered < 0.08 * nx * ny:
        height = max(1.0, share * (nz - 1) * rng.uniform(0.6, 1.0))
        radius = height * rng.uniform(0.55, 0.75)
        centre_3 = np.array([rng.uniform(0, nx), rng.uniform(0, ny), 1 + height - radius])
        add_sphere(distance_XYZ, centre_3, radius, periodic_z=False)
        covered += np.pi * radius**2
    return _flat_bed(shape) | (distance_XYZ < 0)


def _flat_bed(shape: Grid) -> NDArray[np.bool_]:
    solid_XYZ = np.zeros(shape, dtype=bool)
    solid_XYZ[:, :, 0] = True
    return solid_XYZ


def initial_velocity(
    solid_XYZ: NDArray[np.bool_], speed: float, eddy_speed: float, rng: np.random.Generator, floor: int = 0
) -> FloatArray:
    """Divergence-free velocity [3, X, Y, Z]: mean ``speed`` along x in the fluid, plus eddies of rms ``eddy_speed``.

    Both speeds are those of the fluid above the layer ``floor``. Below it there are only eddies, in gaps wide enough.
    """
    nx, ny, nz = solid_XYZ.shape
    depth = nz - 1 - floor
    fade_XYZ = wall_fade(solid_XYZ, lid=True)

    # Stream function of zeta (2 - zeta), the profile of a laminar film on a plane bed.
    zeta_Z = np.clip((np.arange(nz) - floor) / depth, 0, 1)
    stream_Z = zeta_Z**2 - zeta_Z**3 / 3
    base = np.zeros((3, nx, ny, nz))
    base[1] = -stream_Z * fade_XYZ
    base_3XYZ = curl(base, lid=True)
    fluid_XYZ = ~solid_XYZ
    fluid_XYZ[:, :, :floor] = False
    base_3XYZ *= speed / base_3XYZ[0][fluid_XYZ].mean()

    eddy_3XYZ = scaled(eddies(fade_XYZ, _EDDY * depth, True, rng), fluid_XYZ, eddy_speed)
    velocity_3XYZ = base_3XYZ + eddy_3XYZ
    velocity_3XYZ[:, solid_XYZ] = 0
    return velocity_3XYZ
