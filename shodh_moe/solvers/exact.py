"""Exact and published solutions for validating the 3D solver, in its lattice units.

z is the distance from the bed in cells: the first fluid cell above a solid layer has its centre at 1/2.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

# Drag of a sphere in a simple cubic array over Stokes' drag 6 pi mu a U, by solid fraction; U is the mean over the
# whole volume. Zick and Homsy, J. Fluid Mech. 115 (1982) 13, table 2. At the last fraction the spheres touch.
ZICK_HOMSY = {0.027: 2.008, 0.064: 2.810, 0.125: 4.292, 0.216: 7.442, 0.343: 15.4, 0.45: 28.1, 0.5236: 42.1}


def poiseuille(z_Z: Array, gap: float, force: float, viscosity: float) -> Array:
    """Steady velocity [Z] between plates ``gap`` apart; a film of depth h has a gap of 2 h."""
    return force / (2 * viscosity) * z_Z * (gap - z_Z)


def startup(z_Z: Array, time_T: Array, gap: float, force: float, viscosity: float, terms: int = 200) -> Array:
    """Velocity [T, Z] between plates, at rest until the force starts at time 0 (Batchelor 1967, section 4.3)."""
    n_N = 2 * np.arange(terms) + 1
    waves_NZ = np.sin(n_N[:, None] * np.pi * z_Z / gap) / n_N[:, None] ** 3
    decay_TN = np.exp(-viscosity * (n_N * np.pi / gap) ** 2 * time_T[:, None])
    return poiseuille(z_Z, gap, force, viscosity) - 4 * force * gap**2 / (viscosity * np.pi**3) * decay_TN @ waves_NZ


def oscillating_film(z_Z: Array, time_T: Array, depth: float, force: float, viscosity: float, omega: float) -> Array:
    """Periodic velocity [T, Z] of a film under a free-slip lid, driven by ``force cos(omega t)`` since long ago.

    Relative to the bed this is Stokes' second problem at finite depth (the bed oscillates, the far fluid is at rest).
    """
    kappa = np.sqrt(1j * omega / viscosity)
    shape_Z = 1 - np.cosh(kappa * (depth - z_Z)) / np.cosh(kappa * depth)
    swing_TZ = force / (1j * omega) * shape_Z * np.exp(1j * omega * time_T)[:, None]
    return np.asarray(swing_TZ.real)


def channel_friction(width_over_depth: float, terms: int = 200) -> float:
    """Darcy's friction factor f times Re of a laminar open channel with side walls; Re = U R / nu, hydraulic radius R.

    It is 24 for an infinitely wide channel (Nusselt's film). The channel is the lower half of a duct of width w and
    height 2 h, so the result is the duct's Fanning friction factor times its Reynolds number (Shah and London 1978:
    14.22708 for w = 2 h).
    """
    w, n_N = width_over_depth, 2 * np.arange(terms) + 1
    # Mean velocity over depth^2 force / viscosity, from the Fourier series over the depth.
    mean = (1 - 384 / (np.pi**5 * w) * (np.tanh(n_N * np.pi * w / 4) / n_N**5).sum()) / 3
    radius = w / (w + 2)
    return float(8 * radius**2 / mean)


def taylor_green(n: int, speed: float) -> Array:
    """Vortices [3, n, n, 1] with a period of n cells; they decay as exp(-2 viscosity k^2 t), k = 2 pi / n."""
    x, y, z = np.meshgrid(*[2 * math.pi * np.arange(size) / n for size in (n, n, 1)], indexing="ij")
    return speed * np.stack([np.sin(x) * np.cos(y), -np.cos(x) * np.sin(y), 0 * z])


def beltrami(n: int, speed: float) -> Array:
    """The ABC flow [3, n, n, n] with A = B = C: a solution in three dimensions that decays as exp(-viscosity k^2 t).

    Its vorticity is k times its velocity, so the pressure balances advection (Dombre et al. 1986).
    """
    x, y, z = np.meshgrid(*[2 * math.pi * np.arange(n) / n] * 3, indexing="ij")
    return speed * np.stack([np.sin(z) + np.cos(y), np.sin(x) + np.cos(z), np.sin(y) + np.cos(x)])


def sphere_radius(fraction: float) -> float:
    """Radius over cube side of the sphere that fills ``fraction`` of the cube."""
    return float((3 * fraction / (4 * math.pi)) ** (1 / 3))
