"""Divergence and vorticity of a stored velocity by central differences, for checks and pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shodh_moe.data.reading import TrajectoryRecord


def relative_divergence(u_3XYZ: NDArray[np.floating], solid_XYZ: NDArray[np.bool_], record: TrajectoryRecord) -> float:
    """rms(div u) / rms(grad u) by central differences, over fluid voxels with six fluid neighbours in the box."""
    steps = record.spacing or (1.0, 1.0, 1.0)
    fluid = ~solid_XYZ
    squares, total = np.zeros(u_3XYZ.shape[1:]), np.zeros(u_3XYZ.shape[1:])
    used = fluid.copy()
    for axis, step in enumerate(steps):
        used &= np.roll(fluid, 1, axis) & np.roll(fluid, -1, axis)
        if not record.periodic[axis]:
            used[tuple(slice(None) if one != axis else [0, -1] for one in range(3))] = False
        for component in range(3):
            u_XYZ = u_3XYZ[component].astype(np.float64)
            slope = (np.roll(u_XYZ, -1, axis) - np.roll(u_XYZ, 1, axis)) / (2 * step)
            squares += slope**2
            if component == axis:
                total += slope
    gradient = float(squares[used].sum())
    return float(np.sqrt((total[used] ** 2).sum() / gradient)) if gradient else 0.0


def vorticity(
    u_3XYZ: NDArray[np.float32], solid_XYZ: NDArray[np.bool_], record: TrajectoryRecord
) -> NDArray[np.float32]:
    """Magnitude of the curl, [X, Y, Z], by central differences that are one-sided at non-periodic boundaries.

    The velocity in solids counts as zero.
    """
    steps = record.spacing or (1.0, 1.0, 1.0)
    u_3XYZ = np.where(solid_XYZ, 0, u_3XYZ)

    def slope(component: int, axis: int) -> NDArray[np.float32]:
        u_XYZ = u_3XYZ[component]
        if record.periodic[axis]:
            return np.asarray((np.roll(u_XYZ, -1, axis) - np.roll(u_XYZ, 1, axis)) / (2 * steps[axis]))
        return np.asarray(np.gradient(u_XYZ, steps[axis], axis=axis))

    curl = [slope((i + 2) % 3, (i + 1) % 3) - slope((i + 1) % 3, (i + 2) % 3) for i in range(3)]
    return np.asarray(np.sqrt(sum(one**2 for one in curl)))
