"""Open-channel flow: gravity along x, a rough no-slip bed, a free-slip lid as water surface, periodic sideways.

The flow starts from a depth profile plus random eddies. Both are the curl of a vector potential that vanishes
smoothly at the walls, hence divergence-free and at rest in the bed. At the default viscosity the eddies live much
longer than a trajectory; the bulk is pushed to and fro by a pulsed gravity.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from shodh_moe.config import OpenChannelConfig
from shodh_moe.solvers.flow import FloatArray, FlowSetup, Pulse, smooth_step
from shodh_moe.solvers.geometry import add_sphere

# Width in cells over which the potential of the initial flow fades to zero at a wall.
_FADE = 6.0
# Width of the filter that makes the eddies, over the depth; an eddy is about six of these across.
_EDDY = 1 / 8
_FOURTH_ORDER = np.array([1, -8, 0, 8, -1]) / 12


def rough_bed(shape: tuple[int, int, int], roughness: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Solid mask [X, Y, Z]: the bottom layer, and half-buried spheres up to ``roughness`` times the depth high."""
    nx, ny, nz = shape
    solid_XYZ = np.zeros(shape, dtype=bool)
    solid_XYZ[:, :, 0] = True
    largest = roughness * (nz - 1)
    if largest < 1:
        return solid_XYZ
    distance_XYZ = np.full(shape, np.inf)
    # Elements cover about a quarter of the bed.
    covered = 0.0
    while covered < 0.25 * nx * ny:
        height = largest * rng.uniform(0.6, 1.0)
        width = height * rng.uniform(1.0, 1.5)
        # A sphere of which only a cap looks out of the bed: flatter than a half sphere, hence smoother to the grid.
        radius = (width**2 + height**2) / (2 * height)
        centre_3 = np.array([rng.uniform(0, nx), rng.uniform(0, ny), 1 + height - radius])
        add_sphere(distance_XYZ, centre_3, radius, periodic_z=False)
        covered += np.pi * width**2
    return solid_XYZ | (distance_XYZ < 0)


def wall_distance(solid_XYZ: NDArray[np.bool_]) -> FloatArray:
    """Distance [X, Y, Z] in cells from each cell centre to the nearest solid centre, periodic in x and y only."""
    nx, ny, _ = solid_XYZ.shape
    pad_x, pad_y = min(8, nx), min(8, ny)
    wide = np.pad(solid_XYZ, ((pad_x, pad_x), (pad_y, pad_y), (0, 0)), mode="wrap")
    return np.asarray(ndimage.distance_transform_edt(~wide)[pad_x:-pad_x, pad_y:-pad_y])


def initial_velocity(
    solid_XYZ: NDArray[np.bool_], speed: float, eddy_speed: float, rng: np.random.Generator
) -> FloatArray:
    """Divergence-free start [3, X, Y, Z]: mean ``speed`` over the fluid along x, eddies of rms ``eddy_speed``."""
    nx, ny, nz = solid_XYZ.shape
    depth = nz - 1
    fade_XYZ = smooth_step((wall_distance(solid_XYZ) - 1) / _FADE)

    # Profile zeta (2 - zeta) of a laminar film on a plane bed, written as its stream function.
    zeta_Z = np.clip(np.arange(nz) / depth, 0, 1)
    stream_Z = zeta_Z**2 - zeta_Z**3 / 3
    base = np.zeros((3, nx, ny, nz))
    base[1] = -stream_Z * fade_XYZ
    base_3XYZ = _curl(base)
    fluid_XYZ = ~solid_XYZ
    base_3XYZ *= speed / base_3XYZ[0][fluid_XYZ].mean()

    mode = ("wrap", "wrap", "reflect")
    white = rng.standard_normal((3, nx, ny, nz))
    noise = np.stack([ndimage.gaussian_filter(component, _EDDY * depth, mode=mode) for component in white])
    noise *= fade_XYZ
    # No flow through the lid: the horizontal potential vanishes there.
    lid_Z = smooth_step((nz - 0.5 - np.arange(nz)) / _FADE)
    noise[:2] *= lid_Z
    eddy_3XYZ = _curl(noise)
    rms = np.sqrt((eddy_3XYZ[:, fluid_XYZ] ** 2).sum(0).mean())
    velocity_3XYZ = base_3XYZ + eddy_3XYZ * (eddy_speed / max(rms, 1e-30))
    velocity_3XYZ[:, solid_XYZ] = 0
    return velocity_3XYZ


def setup(config: OpenChannelConfig, grid: tuple[int, int, int], rng: np.random.Generator) -> FlowSetup:
    """One open-channel trajectory, drawn from ``rng``."""
    depth = grid[2] - 1
    speed = config.speed * rng.uniform(0.7, 1.3)
    solid_XYZ = rough_bed(grid, config.roughness, rng)
    velocity_3XYZ = initial_velocity(solid_XYZ, speed, config.perturbation * speed, rng)
    pulse = Pulse.draw(rng, config.pulse, config.pulse_period)
    # The slope that keeps a laminar film at this mean speed on a plane bed (Nusselt).
    slope = 3 * config.viscosity * speed / depth**2

    def force(time_T: FloatArray) -> FloatArray:
        force_T3 = np.zeros((len(time_T), 3))
        # The pulse is of the bulk speed: its time derivative is the gravity that makes it so.
        force_T3[:, 0] = slope + speed * pulse.slope(time_T)
        return force_T3

    return FlowSetup(
        solid_XYZ=solid_XYZ,
        lid=True,
        velocity_3XYZ=velocity_3XYZ,
        force=force,
        length=float(depth),
        parameters={"target_speed": speed, "bed_share": float(solid_XYZ[:, :, 1].mean())},
    )


def _curl(a_3XYZ: FloatArray) -> FloatArray:
    """Fourth-order central curl, periodic in x and y, mirrored at both z faces.

    The order matters: what divergence a coarser curl leaves on the lattice would turn into sound at once.
    """

    def d(field_XYZ: FloatArray, axis: int) -> FloatArray:
        mode: Literal["reflect", "wrap"] = "reflect" if axis == 2 else "wrap"
        return np.asarray(ndimage.correlate1d(field_XYZ, _FOURTH_ORDER, axis=axis, mode=mode))

    ax, ay, az = a_3XYZ
    return np.stack([d(az, 1) - d(ay, 2), d(ax, 2) - d(az, 0), d(ay, 0) - d(ax, 1)])
