"""Decaying turbulence: random eddies in a periodic box without solids, walls or force.

The start is a Gaussian random field made divergence-free in Fourier space, with the configured energy spectrum.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from shodh_moe.base.section import PositiveFloat
from shodh_moe.solvers.domains.domain import Domain, Grid, drawn_speed
from shodh_moe.solvers.flow import FloatArray, FlowSetup

Spectrum = Literal["k4", "von_karman"]


class DecayingTurbulence(Domain):
    """Random eddies that decay in a periodic box."""

    viscosity: PositiveFloat = 0.005
    speed: PositiveFloat = Field(0.03, description="initial rms of one velocity component; +-30 % by trajectory")
    spectrum: Spectrum = Field("k4", description="k^4 exp(-2 k^2 / k0^2), or von Karman's with a -5/3 range")
    peak: PositiveFloat = Field(
        2.0, description="wave number k0 of the spectrum's peak, in waves along the shorter side"
    )

    def setup(self, grid: Grid, rng: np.random.Generator) -> FlowSetup:
        """See `Domain.setup`."""
        speed = drawn_speed(self, rng)
        velocity_3XYZ, length = random_turbulence(grid, speed, self.spectrum, self.peak, rng)
        return FlowSetup(
            solid_XYZ=np.zeros(grid, dtype=bool),
            lid=False,
            length=length,
            velocity_3XYZ=velocity_3XYZ,
            reynolds_speed="rms",
            parameters={"target_speed": speed, "spectrum": self.spectrum, "porosity": 1.0},
        )


def energy_spectrum(kind: Spectrum, k: FloatArray, peak: float) -> FloatArray:
    """Energy at wave number ``k``, in any unit. It is largest at ``peak``, which has the same unit as ``k``."""
    if kind == "k4":
        return np.asarray(k**4 * np.exp(-2 * (k / peak) ** 2))
    # k^4 / (k^2 + k_e^2)^(17/6) peaks at sqrt(12 / 5) k_e.
    return np.asarray(k**4 / (k**2 + peak**2 * 5 / 12) ** (17 / 6))


def random_turbulence(
    grid: Grid, speed: float, kind: Spectrum, peak: float, rng: np.random.Generator
) -> tuple[FloatArray, float]:
    """Draw a divergence-free velocity field.

    Waves shorter than three cells are left out, because the lattice would turn their divergence into sound.

    Args:
        speed: rms of one velocity component.
        kind: see `energy_spectrum`.
        peak: wave number of the spectrum's peak, in waves along the shorter side.

    Returns:
        Velocity [3, X, Y, Z], float64, with zero mean, and its integral length in cells.

    Raises:
        ValueError: the peak is at such short waves that none remain.
    """
    # Cycles per cell along each axis. The real transform has only half of the last axis.
    axes = [np.fft.fftfreq(grid[0]), np.fft.fftfreq(grid[1]), np.fft.rfftfreq(grid[2])]
    k_3XYZ = np.stack(np.meshgrid(*axes, indexing="ij"))
    k_XYZ = np.sqrt((k_3XYZ**2).sum(0))
    kept_XYZ = (k_XYZ > 0) & (k_XYZ < 1 / 3)
    k_XYZ = np.where(kept_XYZ, k_XYZ, 1.0)
    # The energy at wave number k spreads over a shell of area 4 pi k^2.
    amplitude_XYZ = np.where(kept_XYZ, np.sqrt(energy_spectrum(kind, k_XYZ, peak / min(grid))) / k_XYZ, 0)
    u_hat = np.fft.rfftn(rng.standard_normal((3, *grid)), axes=(1, 2, 3)) * amplitude_XYZ
    u_hat -= k_3XYZ * ((k_3XYZ * u_hat).sum(0) / k_XYZ**2)
    u_3XYZ = np.fft.irfftn(u_hat, s=grid, axes=(1, 2, 3))
    rms = float(np.sqrt((u_3XYZ**2).mean()))
    if not rms > 0:
        raise ValueError(f"no eddies of peak {peak:g} waves fit grid {list(grid)}: lower peak")
    # The real transform stores one of two conjugate wave numbers, except at k_z = 0 (Nyquist is left out).
    energy_XYZ = (np.abs(u_hat) ** 2).sum(0) * np.where(axes[2] > 0, 2, 1)
    # L = 3 pi / 4 * (integral of E / k) / (integral of E), k in radians per cell.
    length = 3 * np.pi / 4 * float((energy_XYZ / (2 * np.pi * k_XYZ)).sum() / energy_XYZ.sum())
    return u_3XYZ * (speed / rms), length
