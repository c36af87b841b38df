"""Spectral Leray projection: the divergence-free part of a velocity field in a box."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import fft


def project(velocity_3XYZ: NDArray[np.float64], ends: list[str]) -> tuple[NDArray[np.float64], float]:
    """Subtract from a velocity the gradient that has the same divergence.

    Along non-periodic axes the box is mirrored to make it periodic. At walls the normal component is odd and the others
    are even, so that the gradient has no component through the wall; at open ends it is the other way round, so that
    the gradient has no component along the boundary. The result is divergence-free to rounding, in terms of the
    spectral derivatives of the mirrored box.

    Args:
        velocity_3XYZ: velocity at the centres of cubic cells.
        ends: ``periodic``, ``wall`` or ``open`` for each axis.

    Returns:
        The divergence-free velocity [3, X, Y, Z], and the share of the energy that was removed.
    """
    mirrored = np.stack([_mirror(u_XYZ, component, ends) for component, u_XYZ in enumerate(velocity_3XYZ)])
    modes = fft.rfftn(mirrored, axes=(1, 2, 3), overwrite_x=True)
    k = [_wave_numbers(size, axis) for axis, size in enumerate(mirrored.shape[1:])]
    square = k[0] ** 2 + k[1] ** 2 + k[2] ** 2
    # Modes whose derivative is zero (the mean and the Nyquist modes) have no divergence either.
    potential = sum(k[axis] * modes[axis] for axis in range(3)) / np.where(square == 0, 1.0, square)
    for axis in range(3):
        modes[axis] -= k[axis] * potential
    whole = fft.irfftn(modes, s=mirrored.shape[1:], axes=(1, 2, 3), overwrite_x=True)
    _, x, y, z = velocity_3XYZ.shape
    kept = whole[:, :x, :y, :z]
    energy = float(np.sum(velocity_3XYZ**2))
    removed = float(np.sum((velocity_3XYZ - kept) ** 2)) / energy if energy else 0.0
    return kept, removed


def _mirror(u_XYZ: NDArray[np.float64], component: int, ends: list[str]) -> NDArray[np.float64]:
    """Append the odd or even mirror image of a velocity component along each non-periodic axis."""
    for axis, end in enumerate(ends):
        if end != "periodic":
            odd = (axis == component) == (end == "wall")
            u_XYZ = np.concatenate([u_XYZ, (-1 if odd else 1) * np.flip(u_XYZ, axis)], axis)
    return u_XYZ


def _wave_numbers(size: int, axis: int) -> NDArray[np.float64]:
    """Wave numbers for unit cells, 0 for the Nyquist mode, shaped to multiply [X, Y, Z/2 + 1]."""
    k = (fft.rfftfreq(size) if axis == 2 else fft.fftfreq(size)) * 2 * np.pi
    if size % 2 == 0:
        k[size // 2] = 0
    return k.reshape([-1 if one == axis else 1 for one in range(3)])
