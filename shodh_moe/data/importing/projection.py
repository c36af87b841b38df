"""Leray projection: the divergence-free part of a velocity in a box, spectral along every axis."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import fft


def project(velocity_3XYZ: NDArray[np.float64], ends: list[str]) -> tuple[NDArray[np.float64], float]:
    """u minus the gradient that has its divergence, and the share of the energy that this removes.

    A periodic axis is taken as it is. Along any other the box is mirrored, which makes it periodic: at walls the
    normal component is odd and the others are even, so that the gradient has no part through the wall; at open ends it
    is the other way round, so that the gradient has no part along the boundary. The result is divergence-free for the
    spectral derivatives of the mirrored box, to rounding.

    Args:
        velocity_3XYZ: cubic cells, values at the centres.
        ends: per axis ``periodic``, ``wall`` or ``open``.
    """
    mirrored = np.stack([_mirror(u_XYZ, component, ends) for component, u_XYZ in enumerate(velocity_3XYZ)])
    modes = fft.rfftn(mirrored, axes=(1, 2, 3), overwrite_x=True)
    k = [_wave_numbers(size, axis) for axis, size in enumerate(mirrored.shape[1:])]
    square = k[0] ** 2 + k[1] ** 2 + k[2] ** 2
    # Modes without a derivative (the mean and the Nyquist modes) have no divergence either.
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
    for axis, end in enumerate(ends):
        if end != "periodic":
            odd = (axis == component) == (end == "wall")
            u_XYZ = np.concatenate([u_XYZ, (-1 if odd else 1) * np.flip(u_XYZ, axis)], axis)
    return u_XYZ


def _wave_numbers(size: int, axis: int) -> NDArray[np.float64]:
    """Of a unit cell, without the Nyquist mode, shaped to multiply [X, Y, Z/2 + 1]."""
    k = (fft.rfftfreq(size) if axis == 2 else fft.fftfreq(size)) * 2 * np.pi
    if size % 2 == 0:
        k[size // 2] = 0
    return k.reshape([-1 if one == axis else 1 for one in range(3)])
