"""Random eddies around solids: the curl of a random potential that fades to zero at the walls.

They are divergence-free and at rest in solids. With ``lid``, fields are mirrored at both ends of z; otherwise z is
periodic like x and y.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shodh_moe.solvers.flow import FloatArray, smooth_step

# Width in cells over which the potential of a flow fades to zero at a wall.
FADE = 6.0
_FOURTH_ORDER = np.array([1, -8, 0, 8, -1]) / 12


def wall_distance(solid_XYZ: NDArray[np.bool_], lid: bool) -> FloatArray:
    """Distance [X, Y, Z] in cells from each cell centre to the nearest centre of a solid cell; infinite without solids.

    Solids are seen across periodic faces up to a distance of eight cells.
    """
    from scipy import ndimage

    if not solid_XYZ.any():
        return np.full(solid_XYZ.shape, np.inf)
    pads = [min(8, size) for size in solid_XYZ.shape]
    if lid:
        pads[2] = 0
    padded = np.pad(solid_XYZ, [(pad, pad) for pad in pads], mode="wrap")
    inner = tuple(slice(pad, pad + size) for pad, size in zip(pads, solid_XYZ.shape, strict=True))
    return np.asarray(ndimage.distance_transform_edt(~padded)[inner])


def wall_fade(solid_XYZ: NDArray[np.bool_], lid: bool) -> FloatArray:
    """Factor [X, Y, Z] that rises from 0 in and next to solids to 1 away from them."""
    return smooth_step((wall_distance(solid_XYZ, lid) - 1) / FADE)


def eddies(fade_XYZ: FloatArray, width: float, lid: bool, rng: np.random.Generator) -> FloatArray:
    """Random velocity [3, X, Y, Z], not scaled, with eddies of about six ``width`` (in cells) across."""
    from scipy import ndimage

    mode = ("wrap", "wrap", "reflect" if lid else "wrap")
    white = rng.standard_normal((3, *fade_XYZ.shape))
    noise = np.stack([ndimage.gaussian_filter(component, width, mode=mode) for component in white])
    noise *= fade_XYZ
    if lid:
        # No flow through the lid: the horizontal potential vanishes there.
        nz = fade_XYZ.shape[2]
        noise[:2] *= smooth_step((nz - 0.5 - np.arange(nz)) / FADE)
    return curl(noise, lid)


def scaled(velocity_3XYZ: FloatArray, fluid_XYZ: NDArray[np.bool_], speed: float) -> FloatArray:
    """Scale a velocity [3, X, Y, Z] so that its rms over the fluid is ``speed``."""
    rms = np.sqrt((velocity_3XYZ[:, fluid_XYZ] ** 2).sum(0).mean())
    return np.asarray(velocity_3XYZ * (speed / max(rms, 1e-30)))


def curl(a_3XYZ: FloatArray, lid: bool) -> FloatArray:
    """Curl [3, X, Y, Z] of a vector potential [3, X, Y, Z] by fourth-order central differences.

    The order matters: a lower order would leave a divergence on the lattice, which turns into sound at once.
    """
    from scipy import ndimage

    def d(field_XYZ: FloatArray, axis: int) -> FloatArray:
        mode: Literal["reflect", "wrap"] = "reflect" if lid and axis == 2 else "wrap"
        return np.asarray(ndimage.correlate1d(field_XYZ, _FOURTH_ORDER, axis=axis, mode=mode))

    ax, ay, az = a_3XYZ
    return np.stack([d(az, 1) - d(ay, 2), d(ax, 2) - d(az, 0), d(ay, 0) - d(ax, 1)])
