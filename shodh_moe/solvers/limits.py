"""Checks of the lattice Boltzmann solvers' inputs and of a diverged flow, the same on every device."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_SPEED = 0.3


class DivergedError(ArithmeticError):
    """A flow became non-finite or faster than the method allows; the message names the flow and its speed."""


def checked_mask(
    solid_XYZ: ArrayLike, viscosity: float, lid: bool, smagorinsky: float, diffusivity: float | None
) -> NDArray[np.bool_]:
    """Check the inputs of a flow and return the mask as an array.

    Raises:
        ValueError: a mask that is not 3D or has no fluid, a viscosity or diffusivity <= 0, a constant < 0, a lid
            without a solid bottom.
    """
    mask_XYZ = np.asarray(solid_XYZ, dtype=bool)
    if mask_XYZ.ndim != 3 or mask_XYZ.all():
        raise ValueError(f"solid_XYZ must be a 3D mask with some fluid, not shape {mask_XYZ.shape}")
    if not viscosity > 0:
        raise ValueError(f"viscosity must be positive, not {viscosity}")
    if not smagorinsky >= 0:
        raise ValueError(f"smagorinsky must not be negative, not {smagorinsky}")
    if diffusivity is not None and not diffusivity > 0:
        raise ValueError(f"diffusivity must be positive, not {diffusivity}")
    if lid and not mask_XYZ[:, :, 0].all():
        raise ValueError("a lid needs a solid bottom layer: solid_XYZ[:, :, 0] must be all True")
    return mask_XYZ


def require_slow(name: str, speed: float) -> None:
    """Raise `DivergedError` if the maximum ``speed`` of the flow ``name`` is not finite or above 0.3."""
    if not math.isfinite(speed):
        raise DivergedError(f"{name}: the solver diverged (non-finite velocity)")
    if speed > MAX_SPEED:
        raise DivergedError(f"{name}: speed {speed:.3g} exceeds {MAX_SPEED} lattice units")
